"""The training step at the paper's size on a GPU: all 96 probes on Llama-3-8B's shape, with random weights.

    python -m tests.benchmarks.gpu_step --peak 989        # TFLOP/s of the device in bfloat16, dense; 989 is an H100's

Nothing is downloaded: checkpoint (CLIP ViT-L/336, Llama-3-8B) and teachers are built from their configurations on the
device. Prints seconds an image, MFU (operations as `probing plan` counts them, over the time and the peak) and the
memory that was allocated at most. Without a GPU it says so; `--small` runs it all the same, on tiny models.
"""

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import probing.models.llava
import probing.teachers.base
from analysis.planning.probe_training import plan_training
from probing.data.dataloader import MicroBatches, micro_batches
from probing.recipe import ProbeRunRecipe
from probing.teachers import load_teachers
from probing.training.run import load_run_backbone, training_images
from probing.training.schedule import plan_steps
from probing.training.trainer import ProbeTrainer
from tests.helpers import full_size, tiny


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """Models are built from their configurations, on the device, where weights would be read."""

    def fresh(model_class: Any, source: str, config: Any, device: torch.device, dtype: Any, **rest: Any) -> Any:
        build = getattr(model_class, "from_config", None) or model_class._from_config
        with device:
            return build(config, dtype=dtype), set(), set()

    modules: list[Any] = [probing.models.llava, probing.teachers.base]
    real = [module.pretrained for module in modules]
    for module in modules:
        module.pretrained = fresh
    try:
        yield
    finally:
        for module, own in zip(modules, real, strict=True):
            module.pretrained = own


def recipe_of(root: Path, small: bool, batch: int) -> ProbeRunRecipe:
    """All layers but 0, three teachers, no controls, products in bfloat16."""
    if small:
        checkpoint, makers = tiny.llava(root / "llava"), (tiny.depth_teacher, tiny.seg_teacher, tiny.gen_teacher)
        pairs = zip(("depth", "seg", "gen"), makers, strict=True)
        teachers = {name: {"id": str(make(root / name))} for name, make in pairs}
    else:
        checkpoint, teachers = full_size.llava(root / "llava"), full_size.teachers(root)
    data = full_size.coco(root / "coco", train2017=batch, val2017=2)
    return ProbeRunRecipe.model_validate(
        {
            "backbone": {"checkpoint": str(checkpoint), "dtype": "bfloat16"},
            "data": {"path": f"coco:{data}"},
            "teachers": teachers,
            "layers": "1-3" if small else "1-32",
            "controls": [],
            "fit": {"batch_size": batch, "micro_batch": batch, "workers": 0, "ridge": False, "bf16": True},
        }
    )


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the device in bfloat16, dense")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    out = sys.stdout.write
    accelerator = Accelerator()
    device = accelerator.device
    if device.type != "cuda" and not options.small:
        out("no GPU here: nothing was measured; --small runs this on tiny models\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(Path(folder), options.small, options.batch)
        cost = plan_training(recipe).work
        assert cost is not None
        with random_weights():
            backbone, teachers = load_run_backbone(recipe, "none", device), load_teachers(recipe.teachers, device)
        images, layers = training_images(recipe.data), list(range(1, backbone.layers + 1))
        trainer = ProbeTrainer(
            recipe, backbone, teachers, images, layers, ["none"], Path(folder) / "state", accelerator
        )
        state = trainer.initial_state()
        step = replace(plan_steps(len(images), recipe.fit)[0], first=False)
        prepare = {name: teacher.prepare for name, teacher in teachers.items()}
        prepared = next(micro_batches(MicroBatches(images, step.micros, backbone.prepare, prepare), 0, device))

        def run(count: int) -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                trainer.take_step(state, step, iter([prepared]), 1000)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / count

        run(2)
        seconds = run(options.steps)
        work = (cost.flops16 + cost.flops32) * options.batch / 1e12
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        out(f"{name}, {len(state.columns)} probes, {options.batch} images a step\n")
        out(f"step {seconds:.3f} s, {seconds / options.batch:.3f} s an image, {work / seconds:.2f} TFLOP/s")
        out(f", MFU {work / seconds / options.peak:.1%} of {options.peak:g} TFLOP/s\n")
        if device.type == "cuda":
            planned = sum(cost.memory.values()) / 1e9
            out(f"memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, planned {planned:.1f} GB\n")


if __name__ == "__main__":
    main()
