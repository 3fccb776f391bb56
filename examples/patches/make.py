"""Trains the study's checkpoints: LLaVA and OLA, each with and without patch-aligned training, with several seeds.

    python examples/patches/make.py FOLDER --seed 0 --seed 1 --seed 2

Existing files are reused; FOLDER may be that of examples/study, which has the same teachers, world and checkpoints. On
one core, a checkpoint takes about a quarter of an hour.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import click

import probing.utils.torchvision_shim  # noqa: F401
from probing.toyworld.models import Sizes, checkpoint_variants, make_checkpoints, make_study_inputs


def arms(models: Path) -> dict[str, dict[str, Any]]:
    """Returns what stage pt of each checkpoint adds to next-token prediction; stage ift is the same for all."""
    plain = checkpoint_variants(models)
    patches = {"annotations": f"coco:{models / 'world'}"}
    return {
        "llava": plain["llava"],
        "patch": {"patches": patches},
        "ola": plain["ola"],
        "ola_patch": {**plain["ola"], "patches": patches},
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, default=range(3), show_default=True)
def main(folder: Path, seeds: tuple[int, ...]) -> None:
    """Makes FOLDER/models and FOLDER/world, and prints how many questions each checkpoint answers."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("probing").setLevel(logging.INFO)
    models, _ = make_study_inputs(folder)
    for seed in seeds:
        for name, kinds in make_checkpoints(models, Sizes().llava, seed, arms(models)).items():
            click.echo(f"seed {seed}, {name}: {100 * kinds['all']['accuracy']:.1f} % of {kinds['all']['n']} questions")


if __name__ == "__main__":
    main()
