"""Runs the command line in this process, through the error handler of `probing.cli.main`."""

import signal

from click.testing import CliRunner, Result

from probing.cli import cli
from probing.utils.interrupt import SIGNALS, raise_on_signals


def probing(*arguments: object, code: int = 0) -> Result:
    """Runs a command; asserts its exit code, and returns stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    raise_on_signals()
    try:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="probing")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
    return result


def error_line(*arguments: object) -> str:
    """The one line on stderr of a command that the user has to fix."""
    (line,) = (line for line in probing(*arguments, code=2).stderr.splitlines() if line.startswith("probing: "))
    return line.removeprefix("probing: ")
