"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 2.

    The message says what is wrong, why, and what to type instead, in one line.
    """


BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading a file raises that holds something else than it should."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a closing full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
