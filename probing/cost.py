"""What training probes takes, known before any weights are there: memory, work, disk."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from probing.backbones import load_backbone, parse_layers
from probing.dry_run import META, count_flops, dry_run
from probing.errors import UserError
from probing.fit import Fit, plan_steps
from probing.recipe import ProbeRunRecipe
from probing.train import bytes_needed, load_teachers, training_images


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
    passes: int
    disk: int

    def lines(self) -> list[str]:
        """For people; a GB has 10^9 bytes."""
        named = {
            "checkpoint": self.backbone,
            "teachers": self.teachers,
            "probes with gradients and moments": self.probes,
            "sums of ridge readouts": self.sums,
            f"a forward pass of {self.batch} images": self.step,
        }
        parts = ", ".join(f"{name} {_short(size, 'B')}" for name, size in named.items())
        whole = self.images * self.passes * self.flops
        work = f"{self.images:,} images x {self.passes} passes x {_short(self.flops, 'FLOP')}"
        return [
            f"training, work: {work} = {_short(whole, 'FLOP')}",
            f"training, memory of a device: {_short(self.memory, 'B')} ({parts})",
            f"training, disk: {_short(self.disk, 'B')} at its fullest",
        ]

    @property
    def memory(self) -> int:
        """Peak of the device's memory."""
        return self.backbone + self.teachers + self.probes + self.sums + self.step


def _short(number: float, unit: str) -> str:
    """Three digits and a prefix: 16.8 TFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:,.3g} E{unit}"


def training_cost(recipe: ProbeRunRecipe) -> TrainingCost:
    """Runs a micro-batch on shapes alone, and counts; images, configurations and processors are read, and no weights.

    What an allocator keeps besides what is asked of it does not count.

    Args:
        recipe: the run. Quantised weights are counted as if they were not.

    Raises:
        UserError: as training would, but for faults in the weights.
    """
    recipe = recipe.model_copy(deep=True)
    recipe.backbone.device_map = recipe.backbone.quantization_config = None
    images = training_images(recipe.data)
    controls = ["no", *(["shuffled"] if "shuffled" in recipe.controls else [])]
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
        micros = plan_steps(len(images), recipe.fit)[0]
        prepared = next(fit.batches([micros[:1]]))
        if prepared.student is None:
            raise UserError(f"none of the first {len(micros[0])} images could be read; check {images.folder}")
        columns = {column: index for index, column in enumerate(state.columns)}
        before = usage.bytes
        fit.micro_batch(state, prepared, 1.0, True, columns)
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
            passes=recipe.fit.epochs * (1 + ("random" in recipe.controls)),
            disk=bytes_needed(recipe, backbone, teachers, layers),
        )
