"""Does a buffer that holds only some of the images change what probes learn?

    python -m tests.benchmarks.buffer

The toy world's LLaVA. Printed: centred cosine on held-out scenes, mean of layers, of probes trained with a buffer of
some of the images minus those trained with ordinary epochs; paired by seed, with a 95 % interval of Student's t over
seeds. A buffer of all images gives ordinary epochs, see tests/probing/training/test_buffer.py.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t

import probing
from probing.toyworld.demo import demo_recipe
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.training import trainer

TRAIN, VAL, BATCH = 800, 200, 8
WINDOWS = {"all images": None, "a quarter": TRAIN // 4, "three batches": 3 * BATCH}


def scores(world: Path, out: Path, epochs: int, seed: int, window: int | None) -> dict[str, float]:
    """Trains and scores a run; returns mean centred cosine by teacher."""
    recipe = demo_recipe(ASSETS, world, "llava", "0,3,6", [])
    fit = {"epochs": epochs, "batch_size": BATCH, "micro_batch": BATCH, "seeds": [seed], "ridge": False}
    fit |= {"positions": [], "buffer": "auto", "report_to": "none"}
    plan = trainer.plan_window
    if window is not None:
        trainer.plan_window = lambda *_: window
    try:
        run = probing.train(recipe.model_dump() | {"fit": recipe.fit.model_dump() | fit}, out)
    finally:
        trainer.plan_window = plan
    found = probing.evaluate(run, metrics=("cosine",), micro_batch=50)
    found = found[(found.metric == "cosine_centred") & (found.control == "none") & (found.probe == "resampler")]
    return dict(found.groupby("teacher").value.mean())


def main() -> None:
    """Prints the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 10])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    out = sys.stdout.write
    with tempfile.TemporaryDirectory() as folder:
        world = write_world(Path(folder) / "world", TRAIN, VAL, 31)
        for epochs in options.epochs:
            found = {
                name: [scores(world, Path(folder) / f"{epochs}_{name}_{seed}", epochs, seed, window)
                       for seed in range(options.seeds)]
                for name, window in WINDOWS.items()
            }  # fmt: skip
            for name, runs in found.items():
                for teacher in runs[0]:
                    values = np.array([run[teacher] for run in runs])
                    out(f"{epochs:2d} epochs, {name:13s} {teacher:6s} {values.mean():.4f}")
                    difference = values - [run[teacher] for run in found["all images"]]
                    half = student_t.ppf(0.975, len(values) - 1) * difference.std(ddof=1) / len(values) ** 0.5
                    out(f", minus ordinary epochs {difference.mean():+.4f} ± {half:.4f}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
