"""The toy world's study: the same comparison with five seeds of everything that is trained.

python examples/study/study.py make FOLDER --seed 0 --seed 1 --seed 2 --seed 3 --seed 4
"""

import logging
import sys
from pathlib import Path

import click

import probing.compat  # noqa: F401
from probing.data.toyworld.make import Sizes, make_checkpoints, make_models

FOLDER = click.argument("folder", type=click.Path(path_type=Path))
SEEDS = click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, default=range(5), show_default=True)


@click.group()
def main() -> None:
    """Five seeds of the toy world's checkpoints, and what their layers know."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("probing", "analysis", "reports"):
        logging.getLogger(package).setLevel(logging.INFO)


@main.command()
@FOLDER
@SEEDS
def make(folder: Path, seeds: tuple[int, ...]) -> None:
    """Makes teachers, tower and the checkpoints of some seeds in FOLDER/models."""
    models = folder / "models"
    make_models(models, Sizes())
    for seed in seeds:
        make_checkpoints(models, models / "world", Sizes().llava, seed)


if __name__ == "__main__":
    main()
