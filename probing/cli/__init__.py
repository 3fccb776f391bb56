"""The command line. Verbs import what they run, so that `--help` answers at once."""

import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from probing import __version__
from probing.cli.checkpoints import align, assemble, bench, distill, inspect
from probing.cli.hub import import_, pull, push
from probing.cli.probes import compare, erase, evaluate, report, train
from probing.cli.start import demo, plan, teachers
from probing.utils.environment import log_to_stderr, prepare_environment
from probing.utils.errors import UserError
from probing.utils.interrupt import exit_interrupted, raise_on_signals

VERBS = (
    demo, inspect, teachers, plan, assemble, distill, train, evaluate, erase, compare, report,
    align, bench, import_, push, pull,
)  # fmt: skip


class CommandLine(click.Group):
    """A group that lists verbs in pipeline order and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns names in the order in which they were added."""
        return list(self.commands)

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Runs a verb; the only handler of errors.

        Exit codes: 2 and one line where the user can fix it, 130 and the command to resume after an interruption, 1 and
        a traceback for anything else.
        """
        args = list(sys.argv[1:] if args is None else args)
        try:
            return super().main(args, **extra | {"standalone_mode": False})
        except UserError as error:
            _fail(str(error))
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "probing"
            _fail(f"{error.format_message()} See: {path} --help")
        except click.ClickException as error:
            _fail(error.format_message())
        except click.Abort as abort:  # click's name for Ctrl-C, and for EOFError: the end of input, or of a broken file
            if isinstance(abort.__cause__, EOFError):
                raise abort.__cause__ from None
            exit_interrupted(args)
        except KeyboardInterrupt:
            exit_interrupted(args)


def _fail(message: str) -> NoReturn:
    click.echo(f"probing: {' '.join(message.split())}", err=True)
    sys.exit(2)


FIRST = """Start here, with about five minutes on a toy world:
  probing demo --open
Then your own checkpoint:
  probing inspect CHECKPOINT
  probing train --checkpoint CHECKPOINT --data coco:DIR --out RUN
  probing evaluate RUN
  probing report RUN --open
"""


@click.group(
    cls=CommandLine,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='\b\nCompletion in bash; zsh and fish likewise:\n  eval "$(_PROBING_COMPLETE=bash_source probing)"',
)
@click.version_option(__version__, prog_name="probing")
@click.option("--quiet", "-q", is_flag=True, help="Print only warnings and errors.")
@click.pass_context
def cli(ctx: click.Context, quiet: bool) -> None:
    """Measure what each layer of a multimodal LLM knows about the image.

    Without a command: what to do first.
    """
    if ctx.invoked_subcommand is None:
        click.echo(f"{FIRST}\n{ctx.get_help()}")
        return
    handler = log_to_stderr(logging.WARNING if quiet else logging.INFO)
    ctx.call_on_close(lambda: logging.getLogger().removeHandler(handler))


for verb in VERBS:
    cli.add_command(verb)


def main() -> None:
    """Runs the command line as a process."""
    raise_on_signals()
    prepare_environment()
    cli(prog_name="probing")
