"""What training probes takes, known before any weights are there: memory, work, disk."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from probing.models import load_backbone, parse_layers
from probing.recipe import ProbeRunRecipe
from probing.training.run import bytes_needed, load_teachers, training_images
from probing.training.schedule import plan_steps, require_enough
from probing.training.trainer import Fit
from probing.utils.errors import UserError, first_line
from probing.utils.meta_device import META, count_flops, dry_run


@dataclass(frozen=True)
class Devices:
    """Where a training runs, and how fast each device is assumed to be in the long run.

    Attributes:
        number: of devices, each with a process of its own, that share the images.
        short: TFLOP/s in 16-bit numbers.
        long: TFLOP/s in 32-bit numbers.
    """

    number: int = 1
    short: float = 150.0
    long: float = 40.0

    def time(self, short: float, long: float) -> str:
        """How long so many operations take; what is no product of matrices, and reading the images, do not count."""
        hours = (short / self.short + long / self.long) / 1e12 / 3600 / self.number
        each = f"each of {self.number} devices" if self.number > 1 else "one device"
        rates = f"{self.short:g} TFLOP/s in 16-bit numbers and {self.long:g} in 32-bit ones"
        duration = f"{hours:.3g} h" if hours > 1 / 60 else "less than a minute"
        return f"{duration}, at {rates} on {each} (an assumption; --tflops)"


@dataclass(frozen=True)
class TrainingCost:
    """What one process takes on its device, in bytes, and what the whole training takes.

    Attributes:
        backbone: weights of the checkpoint, without what is not needed of it.
        teachers: weights of the teachers.
        probes: weights, gradients and AdamW's two moments.
        sums: of ridge readouts and mean targets.
        step: what a step needs besides, at its peak.
        images: training images of one epoch.
        batch: images of one forward pass.
        flops: per image, forward and backward.
        long: those of them in 32-bit numbers.
        passes: over the images: epochs, and again with random weights where that control is trained.
        disk: at its fullest.
    """

    backbone: int
    teachers: int
    probes: int
    sums: int
    step: int
    images: int
    batch: int
    flops: int
    long: int
    passes: int
    disk: int

    def lines(self, devices: Devices) -> list[str]:
        """For people; a GB has 10^9 bytes."""
        named = {
            "checkpoint": self.backbone,
            "teachers": self.teachers,
            "probes with gradients and moments": self.probes,
            "sums of ridge readouts": self.sums,
            f"a forward pass of {self.batch} images": self.step,
        }
        parts = ", ".join(f"{name} {short(size, 'B')}" for name, size in named.items())
        seen = self.images * self.passes
        work = f"{self.images:,} images x {self.passes} passes x {short(self.flops, 'FLOP')}"
        wide = f"{self.long / self.flops:.0%} in 32-bit numbers"
        return [
            f"training, work: {work} = {short(seen * self.flops, 'FLOP')}, {wide}",
            f"training, time: {devices.time(seen * (self.flops - self.long), seen * self.long)}",
            f"training, memory of a device: {short(self.memory, 'B')} ({parts})",
            f"training, disk: {short(self.disk, 'B')} at its fullest",
        ]

    @property
    def memory(self) -> int:
        """Peak of the device's memory."""
        return self.backbone + self.teachers + self.probes + self.sums + self.step


class CostUnknown(UserError):
    """A checkpoint that can be trained on, but not run on shapes alone."""


def short(number: float, unit: str) -> str:
    """Three digits and a prefix: 16.8 TFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:,.3g} E{unit}"


def training_cost(recipe: ProbeRunRecipe, processes: int = 1) -> TrainingCost:
    """Runs a micro-batch on shapes alone, and counts; images, configurations and processors are read, and no weights.

    What an allocator keeps besides what is asked of it does not count.

    Args:
        recipe: the run. Quantised weights are counted as if they were not, and the probes' products in float32.
        processes: that share the images.

    Raises:
        CostUnknown: training works, and the checkpoint cannot be run on shapes alone.
        UserError: as training would, but for faults in the weights.
    """
    recipe = recipe.model_copy(deep=True)
    recipe.backbone.device_map = recipe.backbone.quantization_config = None
    images = training_images(recipe.data)
    controls = ["none", *(["shuffled"] if "shuffled" in recipe.controls else [])]
    with dry_run() as usage:
        backbone = load_backbone(recipe.backbone, META)
        layers = parse_layers(recipe.layers, backbone.layers)
        loaded = usage.bytes
        teachers = load_teachers(recipe, META)
        ready = usage.bytes
        device: Any = SimpleNamespace(device=META, num_processes=1)
        fit = Fit(recipe, backbone, teachers, images, layers, controls, Path(), device)
        state = fit.start()
        parameters = usage.bytes - ready
        moments = [torch.zeros_like(p) for own in state.parameters for p in own for _ in range(2)]
        require_enough(len(images), recipe.fit, processes)
        micros = plan_steps(len(images), recipe.fit.model_copy(update={"epochs": 1}), 0, processes)[0]
        prepared = next(fit.batches([micros[:1]]))
        if prepared.student is None:
            raise UserError(f"none of the first {len(micros[0])} images could be read; check {images.folder}")
        columns = {column: index for index, column in enumerate(state.columns)}
        before = usage.bytes
        try:
            fit.micro_batch(state, prepared, 1.0, True, columns)
        except (RuntimeError, NotImplementedError) as error:
            raise CostUnknown(
                f"{recipe.backbone.checkpoint} cannot be run on shapes alone, so its cost cannot be counted "
                f"({first_line(error)}); train without a plan"
            ) from None
        sums = usage.bytes - before - parameters  # what stays besides the gradients
        if len(micros) == 1:
            state.optimizer.zero_grad(set_to_none=True)
        with count_flops() as flops:
            fit.micro_batch(state, prepared, 1.0, True, columns)
        del moments
        return TrainingCost(
            backbone=loaded,
            teachers=ready - loaded,
            probes=4 * parameters,
            sums=sums,
            step=usage.peak - ready - 4 * parameters - sums,
            images=len(images),
            batch=len(prepared.indices),
            flops=flops() // len(prepared.indices),
            long=flops.long // len(prepared.indices),
            passes=recipe.fit.epochs * (1 + ("random" in recipe.controls)),
            disk=bytes_needed(recipe, backbone, teachers, layers),
        )
