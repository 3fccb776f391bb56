"""What `probing evaluate` costs over its floor.

    python -m tests.benchmarks.evaluation

The floor reads and prepares the same images, and runs checkpoint, teachers and the probes of every layer on them.
The metric is cosine, for the toy world's LLaVA over 1,000 scenes, and a LLaVA with 576 patches over fewer.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from probing.data.dataloader import MicroBatches, micro_batches
from probing.models import Layer, load_backbone, parse_layers
from probing.probes.bank import ProbeBank
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run
from probing.teachers import load_teachers
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.training.run import held_out_images, train
from tests.helpers import tiny

CPU = torch.device("cpu")


@torch.no_grad()
def floor(run: Run, batch: int) -> float:
    """Seconds of reading, preparing, forward passes and predictions."""
    recipe = run.recipe
    backbone, teachers = load_backbone(recipe.backbone, CPU), load_teachers(recipe.teachers, CPU)
    bank, images = ProbeBank.load(run.probes("none"), CPU), held_out_images(recipe.data)
    plan = [list(range(first, min(first + batch, len(images)))) for first in range(0, len(images), batch)]
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    start = time.perf_counter()
    for prepared in micro_batches(MicroBatches(images, plan, backbone.prepare, prepare), 0, CPU):
        assert prepared.student is not None

        def predict(layer: Layer, hidden: Tensor) -> None:
            with torch.no_grad():
                for _, probe in bank.at(layer):
                    probe(hidden)

        for teacher in teachers.values():
            prepared.target(teacher)
        backbone.stream(prepared.student, parse_layers(recipe.layers, backbone.layers), predict)
    return time.perf_counter() - start


def compare(name: str, checkpoint: Path, root: Path, images: int, batch: int) -> None:
    """Prints both times and their ratio."""
    world = write_world(root / f"world{images}", 2, images, seed=7)
    values = {
        "backbone": {"checkpoint": str(checkpoint), "dtype": "float32"},
        "data": {"path": f"coco:{world}"},
        "teachers": {teacher: {"id": str(ASSETS / teacher)} for teacher in ("depth", "seg", "gen")},
        "controls": [],
        "fit": {"epochs": 1, "batch_size": 2, "micro_batch": 2, "workers": 0, "report_to": "none", "ridge": False},
    }
    run = train(ProbeRunRecipe.model_validate(values), root / name)
    before = floor(run, batch)
    start = time.perf_counter()
    evaluate(run.path, Options(metrics=("cosine",), micro_batch=batch))
    whole = time.perf_counter() - start
    least = (before + floor(run, batch)) / 2  # before and after, since other work may disturb one
    sys.stdout.write(
        f"{name}: {images} images, floor {least:.1f} s, evaluate {whole:.1f} s, ratio {whole / least:.2f}\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Runs both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        compare("toy", ASSETS / "llava", root, images=1000, batch=16)
        large = tiny.llava(root / "large", layers=16, hidden=1024, image=192)
        compare("576 patches, 16 layers of width 1,024", large, root, images=48, batch=4)


if __name__ == "__main__":
    main()
