"""Errors that the user can fix."""

from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix; the command line prints it as one line and exits with 2.

    The message says what is wrong, then what to do.
    """


BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What parsing a file raises whose content is not what it should be."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without a closing full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def require_probes(source: object, what: str, requested: Iterable[str], available: Iterable[str]) -> None:
    """Raises UserError if a requested teacher or layer is not among those that a source has probes of."""
    names = list(available)
    for name in requested:
        if name not in names:
            raise UserError(f"{source} has no probes of {what} {name!r}; choose from {', '.join(names)}")
