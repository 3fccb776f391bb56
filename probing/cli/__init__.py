"""The command line. Each verb imports its own weight, so that `--help` answers at once."""

import logging
import os
import sys
from typing import NoReturn

import click

from probing import __version__
from probing.cli.checkpoints import align, bench, distill, inspect
from probing.cli.hub import import_, pull, push
from probing.cli.probes import compare, evaluate, report, train
from probing.cli.start import demo, plan, teachers
from probing.utils.environment import prepare_environment
from probing.utils.errors import UserError
from probing.utils.interrupt import exit_interrupted, raise_on_signals


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="probing")
@click.option("--quiet", "-q", is_flag=True, help="Only warnings and errors.")
def cli(quiet: bool) -> None:
    """What does each layer of a multimodal LLM know about the picture?

    Start with `probing demo`. On your own checkpoint: train, evaluate, report.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("probing", "analysis", "reports"):
        logging.getLogger(package).setLevel(level)


for verb in (
    demo,
    teachers,
    inspect,
    plan,
    distill,
    train,
    evaluate,
    compare,
    report,
    align,
    bench,
    import_,
    push,
    pull,
):
    cli.add_command(verb)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"probing: {' '.join(message.split())}", err=True)
    sys.exit(code)


def main() -> None:
    """Runs the command line.

    Exit codes: 2 and one line where the user can fix it, 130 and the command to resume after Ctrl-C or SIGTERM, 1 and a
    traceback for our faults.
    """
    raise_on_signals()
    prepare_environment()
    try:
        cli.main(prog_name="probing", standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "probing"
        _fail(f"{error.format_message()} See: {path} --help", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # to click, the end of what a user types; to us, a file cut short
            raise abort.__cause__ from None
        exit_interrupted()
    except KeyboardInterrupt:
        exit_interrupted()
