"""What recording the errors of the code length adds to training.

    python -m tests.benchmarks.code_length

One epoch of the toy world's LLaVA over 300 scenes, seven layers and three teachers with cached targets, in turns with
and without; the best of each.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

import probing
from probing.toyworld.demo import demo_recipe
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.training.prequential import PrequentialErrors

SCENES, TURNS = 300, 4


def seconds(recipe: dict[str, object], out: Path, record: bool) -> float:
    """Trains a run; returns the seconds in its steps."""
    with patch.object(PrequentialErrors, "part_begins", PrequentialErrors.part_begins if record else False):
        return float(probing.train(recipe, out).manifest["seconds"])


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        world = write_world(Path(folder) / "world", SCENES, 4, 17)
        recipe = demo_recipe(ASSETS, world, "llava", "all", []).model_dump()
        recipe["fit"] |= {"epochs": 1, "batch_size": 16, "micro_batch": 16, "report_to": "none"}
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(TURNS):
            for record, own in times.items():
                own.append(seconds(recipe, Path(folder) / f"{turn}_{record}", record))
        with_errors, without = min(times[True]), min(times[False])
        sys.stdout.write(f"training with errors / without: {with_errors / without:.3f} ({with_errors:.1f} s)\n")


if __name__ == "__main__":
    main()
