"""What recording the errors of the code length adds to training, and what positions of the prompt add.

    python -m tests.benchmarks.code_length

Two epochs (the default) of the toy world's LLaVA over 300 scenes, all layers and three teachers with cached targets.
Variants take turns; the best time of each counts.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import probing
from probing.toyworld.demo import demo_recipe
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.training.prequential import PrequentialErrors

SCENES, TURNS = 300, 4


def seconds(recipe: dict[str, Any], out: Path, record: bool, positions: list[str]) -> float:
    """Trains a run; returns the seconds in its steps."""
    recipe["fit"]["positions"] = positions
    with patch.object(PrequentialErrors, "part_begins", PrequentialErrors.part_begins if record else False):
        return float(probing.train(recipe, out).manifest["seconds"])


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="of which the first is recorded")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    variants: dict[str, tuple[bool, list[str]]] = {
        "without": (False, []), "code length": (True, []), "and three positions": (True, ["image", "text", "last"]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        world = write_world(Path(folder) / "world", SCENES, 4, 17)
        recipe = demo_recipe(ASSETS, world, "llava", "all", []).model_dump()
        recipe["fit"] |= {"epochs": options.epochs, "batch_size": 16, "micro_batch": 16, "report_to": "none"}
        best = dict.fromkeys(variants, float("inf"))
        for turn in range(TURNS):
            for number, (name, variant) in enumerate(variants.items()):
                best[name] = min(best[name], seconds(recipe, Path(folder) / f"{turn}_{number}", *variant))
        for name, least in best.items():
            sys.stdout.write(f"{name:20s} {least:6.1f} s  {least / best['without']:.3f}\n")


if __name__ == "__main__":
    main()
