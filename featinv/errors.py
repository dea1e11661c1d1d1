"""The one exception that means "the user gave us something we cannot use"."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
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
    """Return what stands behind an error of Hydra's `instantiate`.

    That is an `InputError` where there is one, or where a class refused a value or an argument;
    else the innermost cause.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, InputError):
            return cause
    if len(causes) > 1 and isinstance(causes[-1], TypeError | ValueError):
        reason = " ".join(str(causes[-1]).split())
        return InputError(f"The configuration does not fit: {reason.rstrip('.')}.")
    return causes[-1]


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that tells bad arguments in one sentence, with exit code 2."""

    def error(self, message: str) -> None:
        """Exit with the sentence."""
        self.exit(2, f"{self.prog}: {message}; --help lists the arguments.\n")


def exit_code(command: Callable[[], None]) -> int:
    """Run a command; return 0, or print an `InputError`'s sentence and return 2."""
    logging.basicConfig(format="%(message)s")
    try:
        command()
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0
