"""Trains the study's teachers and its checkpoints with several seeds, and makes the worlds.

    python examples/study/make.py FOLDER --seed 0 --seed 1 --seed 2 --seed 3 --seed 4

Existing files are reused. Once teachers and tower exist, several processes may run in parallel, each with different
seeds. On one core, a seed takes about three quarters of an hour.
"""

import json
import logging
import sys
from pathlib import Path

import click

import probing.utils.torchvision_shim  # noqa: F401
from probing.toyworld.llava import answer_accuracy
from probing.toyworld.models import Sizes, checkpoint_variants, make_checkpoints, make_study_inputs
from probing.utils.files import write_text

QUESTIONS = 2000


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, default=range(5), show_default=True)
def main(folder: Path, seeds: tuple[int, ...]) -> None:
    """Makes FOLDER/models and FOLDER/world, and prints how well each checkpoint answers questions."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("probing").setLevel(logging.INFO)
    models, world = make_study_inputs(folder)
    for seed in seeds:
        make_checkpoints(models, Sizes().llava, seed)
        file = folder / f"answers_{seed}.json"
        if file.exists():
            continue
        stages = models / "stages" / f"seed_{seed}"
        names = checkpoint_variants(models)
        found = {name: answer_accuracy(stages / name / "ift", world, "test2017", QUESTIONS) for name in names}
        write_text(file, json.dumps(found, indent=2) + "\n")
        for name, kinds in found.items():
            click.echo(f"seed {seed}, {name}: {100 * kinds['all']['accuracy']:.1f} % of {kinds['all']['n']} questions")


if __name__ == "__main__":
    main()
