"""Trains the tiny models that ship with the package, from nothing, and copies them into it.

    python examples/toy/make_assets.py WORK_FOLDER

About an hour on two CPU cores. Finished files in WORK_FOLDER are reused; the command can be repeated.
"""

import logging
import sys
from pathlib import Path

import click

from probing.toyworld.models import Sizes, make_models, write_assets


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Trains the models in FOLDER and copies them into the package in half precision."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    make_models(folder, Sizes())
    click.echo(f"assets: {write_assets(folder):.1f} MB")


if __name__ == "__main__":
    main()
