"""Memory that `probing plan` estimates over measured memory, for training probes or a checkpoint.

    python -m tests.benchmarks.memory
    python -m tests.benchmarks.memory --stage ift

The measured value is the peak of a fresh process that trains on a CPU, minus its memory after training something tiny,
so that libraries do not count. glibc is set to return freed memory at once; by default it leaves holes, which make a
process up to twice as large.
"""

import argparse
import gc
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

import probing.utils.torchvision_shim  # noqa: F401
from analysis.planning.distillation import plan_stage
from analysis.planning.probe_training import plan_training
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.recipe import ProbeRunRecipe
from probing.training.run import train
from tests.helpers import tiny

MB = 2**20


def make_recipe(root: Path, hidden: int, layers: int, side: int, micro_batch: int) -> ProbeRunRecipe:
    """A LLaVA for images of some size in pixels, in patches of 8; three teachers, all layers."""
    return ProbeRunRecipe.model_validate(
        {
            "backbone": {"checkpoint": str(tiny.llava(root / "llava", layers=layers, hidden=hidden, image=side))},
            "data": {"path": f"coco:{tiny.coco(root / 'coco', train=2 * micro_batch, val=2)}"},
            "teachers": {
                "depth": {"id": str(tiny.depth_teacher(root / "depth", width=256, size=196))},
                "seg": {"id": str(tiny.seg_teacher(root / "seg", width=32))},
                "gen": {"id": str(tiny.gen_teacher(root / "gen", projection=256))},
            },
            "controls": [],
            "fit": {"epochs": 1, "batch_size": micro_batch, "micro_batch": micro_batch, "workers": 0},
        }
    )


def make_stage(root: Path, stage: str, hidden: int, layers: int, side: int, micro_batch: int) -> DistillRecipe:
    """The same LLaVA and teachers, in two steps of a stage with embedding losses."""
    probes = make_recipe(root, hidden, layers, side, micro_batch)
    images = sorted((root / "coco/train2017").iterdir())
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red cube " * 8}]
    entries = [{"image": image.name, "conversations": turns} for image in images]
    (root / "conversations.json").write_text(json.dumps(entries))
    teachers = {name: teacher.model_dump() for name, teacher in probes.teachers.items()}
    return DistillRecipe.model_validate(
        {
            "checkpoint": probes.backbone.checkpoint,
            "stage": stage,
            "data": {"conversations": str(root / "conversations.json"), "image_root": str(images[0].parent)},
            "embedding": {"teachers": teachers, "layers": dict.fromkeys(teachers, str(layers)), "seek": 1},
            "batch_size": 2 * micro_batch,
            "micro_batch": micro_batch,
            "epochs": 2,  # AdamW's moments exist from the second step on
            "workers": 0,
            "trainer": {"report_to": "none", "use_cpu": True},
        }
    )


def main() -> None:
    """Prints a table; each row is measured in a separate process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["512,4,224,16", "1024,8,128,4", "1024,2,224,8"])
    parser.add_argument("--stage", choices=["pt", "vpt", "ift"])
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    out = sys.stdout.write
    if options.run and options.stage:
        run_stage(make_stage(options.run / "tiny", options.stage, 32, 1, 32, 2), options.run / "tiny_run")
        gc.collect()
        base = psutil.Process().memory_info().rss / MB
        run_stage(DistillRecipe.model_validate_json((options.run / "recipe.json").read_text()), options.run / "run")
        out("\n" + json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base))
        return
    if options.run:
        train(make_recipe(options.run / "tiny", hidden=32, layers=1, side=32, micro_batch=2), options.run / "tiny_run")
        gc.collect()
        base = psutil.Process().memory_info().rss / MB
        train(ProbeRunRecipe.model_validate_json((options.run / "recipe.json").read_text()), options.run / "run")
        out("\n" + json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base))
        return
    out("hidden layers batch    planned   measured  planned / measured (MB)\n")
    for sizes in options.sizes:
        hidden, layers, side, micro_batch = map(int, sizes.split(","))
        with tempfile.TemporaryDirectory() as folder:
            recipe: ProbeRunRecipe | DistillRecipe
            if options.stage:
                recipe = make_stage(Path(folder), options.stage, hidden, layers, side, micro_batch)
                plan = plan_stage(recipe)
            else:
                recipe = make_recipe(Path(folder), hidden, layers, side, micro_batch)
                plan = plan_training(recipe)
            (Path(folder) / "recipe.json").write_text(recipe.model_dump_json())
            command = [sys.executable, "-m", "tests.benchmarks.memory", "--run", folder]
            command += ["--stage", options.stage] if options.stage else []
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            measured = json.loads(done.stdout.splitlines()[-1])
        assert plan.work is not None
        planned = plan.work.total.memory / MB
        parts = ", ".join(f"{name} {part.memory / MB:.0f}" for name, part in plan.work.parts.items())
        out(f"{parts}\n{hidden:6d} {layers:6d} {micro_batch:5d} {planned:10.0f} {measured:10.0f}")
        out(f" {planned / measured:8.2f}\n")


if __name__ == "__main__":
    main()
