"""What each step of a training of probes sees, and at which learning rate."""

import math

import numpy as np
import torch

from probing.recipe import FitRecipe
from probing.utils.errors import UserError


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then a cosine to zero.

    Args:
        step: 0-based step about to be taken.
        steps: number of steps.
        peak: highest rate.
        warmup: share of the steps spent rising.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def plan_steps(images: int, fit: FitRecipe, process: int = 0, processes: int = 1) -> list[list[list[int]]]:
    """Which images each optimiser step sees: steps → micro-batches of this process → image indices.

    The order depends on the first seed and the epoch alone, so a resumed run needs no saved sampler state.
    """
    steps = []
    for epoch in range(fit.epochs):
        generator = torch.Generator().manual_seed(fit.seeds[0] * 1_000_003 + epoch)
        order = torch.randperm(images, generator=generator).tolist()
        for start in range(0, images, fit.batch_size):
            mine = order[start : start + fit.batch_size][process::processes]
            parts = np.array_split(mine, math.ceil(len(mine) / fit.micro_batch)) if mine else []
            steps.append([part.tolist() for part in parts])
    return steps


def count_steps(images: int, fit: FitRecipe) -> int:
    """How many optimiser steps there are."""
    return fit.epochs * math.ceil(images / fit.batch_size)


def require_enough(images: int, fit: FitRecipe, processes: int) -> None:
    """Raises UserError where some process would have no image of a batch."""
    if min(images, fit.batch_size) < processes:
        raise UserError(f"{processes} processes for {images} images in batches of {fit.batch_size}; use fewer")
