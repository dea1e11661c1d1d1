"""The one exception that means "the user gave us something we cannot use"."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Bad input, told in one sentence: the value, what was expected, the nearest valid choice.

    Entry points print the sentence without a traceback and exit with code 2.
    """


def unknown(kind: str, value: object, choices: Iterable[str], limit: int = 3) -> InputError:
    """Return an `InputError` for a name that is not among `choices`, nearest ones first.

    Args:
        kind: What the name is, e.g. `"backbone"`.
        value: The name that was given.
        choices: All valid names.
        limit: How many names are offered.
    """
    choices = list(choices)
    nearest = get_close_matches(str(value), choices, n=limit, cutoff=0.5)
    if nearest:
        hint = f"did you mean {', '.join(nearest)}?"
    elif len(choices) <= 20:
        hint = f"choose from {', '.join(choices)}."
    else:
        hint = f"choose one of {len(choices)}, for example {', '.join(choices[:limit])}."
    return InputError(f"Unknown {kind} '{value}': {hint}")


def cause_of(error: BaseException) -> BaseException:
    """Return the `InputError` that stands behind an error of Hydra's `instantiate`.

    An argument that a class does not have is bad input too. Any other error is returned as it is.
    """
    cause, last = error, error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause, last = cause.__cause__, cause
    if isinstance(last, TypeError) and "argument" in str(last):
        return InputError(f"The configuration does not fit: {last}.")
    return error
