"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 2.

    The message says what is wrong, why, and what to type instead, in one line.
    """


BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading a file raises that holds something else than it should."""
