"""Makes what the study compares: LLaVA and OLA, each with and without patch-aligned training, of several seeds.

    python examples/patches/make.py FOLDER --seed 0 --seed 1 --seed 2

What is there already is kept; FOLDER may be that of examples/study, whose teachers, world and checkpoints are these. On
one core, a checkpoint takes about a quarter of an hour.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

import probing.compat  # noqa: F401
from probing.data.toyworld.layout import write_world
from probing.data.toyworld.llava import answer_accuracy, make_llava, make_reader
from probing.data.toyworld.make import Sizes, checkpoints, make_teachers
from probing.run import write_text

TRAIN_SCENES, VAL_SCENES, TEST_SCENES, WORLD_SEED = 4000, 400, 600, 12
"""As in examples/study: no teacher, tower or checkpoint has seen the scenes of the test."""


def arms(models: Path) -> dict[str, dict[str, Any]]:
    """What stage pt of each checkpoint has beside next-token prediction; stage ift is the same for all."""
    plain = checkpoints(models)
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
    """Makes FOLDER/models and FOLDER/world, and says how many questions each checkpoint answers."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("probing").setLevel(logging.INFO)
    models, schedule = folder / "models", Sizes().llava
    write_world(folder / "world", TRAIN_SCENES, VAL_SCENES, WORLD_SEED, TEST_SCENES)
    make_teachers(models, Sizes())
    for seed in seeds:
        stages = models / "stages" / f"seed_{seed}"
        reader = make_reader(models / "world", models / "stages" / "tower", stages, schedule, seed=seed)
        for name, beside in arms(models).items():
            answers = stages / name / "answers.json"
            if answers.exists():
                continue
            last = make_llava(models / "world", reader, stages / name, schedule, seed, beside)
            found = answer_accuracy(last, models / "world")
            write_text(answers, json.dumps(found, indent=2) + "\n")
            click.echo(f"seed {seed}, {name}: {100 * found['all']['accuracy']:.1f} % of {found['all']['n']} questions")


if __name__ == "__main__":
    main()
