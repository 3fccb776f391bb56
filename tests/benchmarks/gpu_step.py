"""The training step at the paper's size on a GPU: all 96 probes on Llama-3-8B's shape, with random weights.

    python -m tests.benchmarks.gpu_step --peak 989        # TFLOP/s of the device in bfloat16, dense; 989 is an H100's

Nothing is downloaded: checkpoint (CLIP ViT-L/336, Llama-3-8B) and teachers are built from their configurations on the
device. Prints the step and its parts, the step over its floor (the sum of the parts, each alone), MFU (operations as
`probing plan` counts them, over the time and the peak), peak allocated memory, and the kernels of attention. It needs a
GPU, except with `--small`, for tiny models.
"""

import argparse
import contextlib
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import probing.models.llava
import probing.teachers.base
from analysis.planning.probe_training import plan_training
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.recipe import ProbeRunRecipe
from probing.teachers import load_teachers
from probing.training.run import load_run_backbone, training_images
from probing.training.schedule import Step, plan_steps
from probing.training.state import TrainerState
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


@dataclass
class Benchmark:
    """A trainer, its state and one batch of images on the device."""

    trainer: ProbeTrainer
    state: TrainerState
    step: Step
    prepared: Prepared

    @classmethod
    def build(cls, recipe: ProbeRunRecipe, accelerator: Accelerator, folder: Path) -> "Benchmark":
        device = accelerator.device
        with random_weights():
            backbone, teachers = load_run_backbone(recipe, "none", device), load_teachers(recipe.teachers, device)
        images, layers = training_images(recipe.data), list(range(1, backbone.layers + 1))
        trainer = ProbeTrainer(recipe, backbone, teachers, images, layers, ["none"], folder / "state", accelerator)
        step = replace(plan_steps(len(images), recipe.fit)[0], first=False)
        prepare = {name: teacher.prepare for name, teacher in teachers.items()}
        prepared = next(micro_batches(MicroBatches(images, step.micros, backbone.prepare, prepare), 0, device))
        return cls(trainer, trainer.initial_state(), step, prepared)

    def works(self) -> dict[str, Callable[[], object]]:
        """The step, and the parts of its floor, each alone."""
        trainer, prepared, teachers = self.trainer, self.prepared, self.trainer.teachers
        assert prepared.student is not None
        batch = prepared.student.to(trainer.backbone.device)
        probes = self.state.banks["none"].probes
        targets = {name: prepared.target(teacher) for name, teacher in teachers.items()}
        states: list[torch.Tensor] = []
        trainer.backbone.stream(batch, trainer.layers[-1:], lambda _, hidden: states.append(hidden))
        keys, mask = batch.tokens.select(states[0], trainer.recipe.probe.keys)

        @torch.no_grad()
        def backbone() -> None:
            trainer.backbone.core(**batch.inputs, use_cache=False)

        def train_probes() -> None:
            for key, probe in probes.items():
                with torch.autocast(trainer.accelerator.device.type, torch.bfloat16):
                    prediction = probe(keys, mask)
                F.smooth_l1_loss(prediction.float(), targets[key.teacher]).backward()

        def optimise() -> None:
            for probe in probes.values():
                torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            self.state.optimizer.step()

        return {
            "step": lambda: trainer.take_step(self.state, self.step, iter([prepared]), 1000),
            "backbone": backbone,
            "teachers": lambda: [prepared.target(teacher) for teacher in teachers.values()],
            "probes": train_probes,
            "optimiser": optimise,
            "first visit": self.first_visit,
            "next part": lambda: trainer._begin_part(self.state),  # solves the ridge readouts, log2(steps) times a run
        }

    def first_visit(self) -> None:
        """A step that also gathers ridge sums and the errors of the code length."""
        ridge = self.trainer.recipe.model_copy(
            update={"fit": self.trainer.recipe.fit.model_copy(update={"ridge": True})}
        )
        trainer = replace(self.trainer, recipe=ridge)
        self.state.prequential.batches = 3  # no part of the code begins with this step
        if not self.state.prequential.maps:
            trainer.take_step(self.state, replace(self.step, first=True), iter([self.prepared]), 1000)
            trainer._begin_part(self.state)
        trainer.take_step(self.state, replace(self.step, first=True), iter([self.prepared]), 1000)

    def kernels(self) -> dict[str, float]:
        """Seconds on the device by kernel, of one step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.works()["step"]()
            torch.cuda.synchronize()
        return {event.key: event.self_device_time_total / 1e6 for event in profile.key_averages()}


def seconds_of(work: Callable[[], object], device: torch.device, turns: int) -> float:
    """Median of some turns, each synchronised with the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    for _ in range(turns + 2):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the device in bfloat16, dense")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
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
        benchmark = Benchmark.build(recipe, accelerator, Path(folder))
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        out(f"{name}, {len(benchmark.state.columns)} probes, {options.batch} images a step\n")
        found = {}
        for part, work in benchmark.works().items():
            found[part] = seconds_of(work, device, options.turns)
            out(f"{part:12s} {1e3 * found[part]:6.0f} ms\n")
            if part == "step" and device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 1e9
                out(f"memory {peak:.1f} GB, planned {cost.total.memory / 1e9:.1f} GB\n")
            sys.stdout.flush()
        floor = sum(found[part] for part in ("backbone", "teachers", "probes", "optimiser"))
        out(f"step / (backbone + teachers + probes + optimiser) {found['step'] / floor:.2f}\n")
        out(f"first visit, with ridge sums and code length / step {found['first visit'] / found['step']:.2f}\n")
        tera = (cost.total.flops16 + cost.total.flops32) * options.batch / 1e12 / found["step"]
        out(f"{found['step'] / options.batch:.3f} s an image, {tera:.2f} TFLOP/s, ")
        out(f"MFU {tera / options.peak:.1%} of {options.peak:g} TFLOP/s\n")
        if device.type == "cuda":
            kernels = benchmark.kernels()
            out(f"device busy {sum(kernels.values()) / found['step']:.0%} of a step; attention:\n")
            for name in sorted(name for name in kernels if any(part in name for part in ("flash", "fmha", "softmax"))):
                out(f"{1e3 * kernels[name]:6.0f} ms {name[:100]}\n")


if __name__ == "__main__":
    main()
