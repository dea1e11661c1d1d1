"""InputError: the exception for bad input, and helpers for its messages."""

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral


class InputError(ValueError):
    """Bad input in one sentence: the value, what was expected, the nearest valid choice.

    Entry points print the sentence without a traceback and exit with code 2.
    """


def unknown(kind: str, value: object, choices: Iterable[str]) -> InputError:
    """Return an `InputError` for a name that is not in `choices`, with the nearest ones.

    Args:
        kind: What the name stands for, e.g. `"backbone"`.
        value: The unknown name.
        choices: All valid names.
    """
    choices = list(choices)
    nearest = get_close_matches(str(value), choices, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}?"
    if not nearest:
        hint = f"choose from {listing(choices, limit=20)}."
    return InputError(f"Unknown {kind} '{value}': {hint}")


def at_least(name: str, value: int, minimum: int) -> int:
    """Return an option, or raise an `InputError` unless it is an integer of at least `minimum`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise InputError(f"{name} is {value!r}: expected an integer of at least {minimum}.")
    return value


def multiple_of(name: str, value: int, factor: int, why: str) -> int:
    """Return a size, or raise an `InputError` with the nearest multiple of `factor` above 0."""
    if value < 1 or value % factor:
        nearest = max(1, round(value / factor)) * factor
        raise InputError(
            f"{name} is {value}, expected a multiple of {factor} ({why}), for example {nearest}."
        )
    return value


def listing(names: Iterable[object], limit: int = 5) -> str:
    """Return "a, b, c and 7 more", or "nothing"."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
