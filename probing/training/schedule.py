"""Images and learning rate of each training step."""

import math

import numpy as np
import torch

from probing.recipe import FitRecipe
from probing.utils.errors import UserError


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Returns the rate of a 0-based step: linear warm-up over a fraction of the steps, then a cosine to zero."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def plan_steps(images: int, fit: FitRecipe, rank: int = 0, world_size: int = 1) -> list[list[list[int]]]:
    """Returns image indices per step and micro-batch, for one process.

    The order depends only on the first seed and the epoch, so a resumed run needs no sampler state.
    """
    steps = []
    for epoch in range(fit.epochs):
        generator = torch.Generator().manual_seed(fit.seeds[0] * 1_000_003 + epoch)
        order = torch.randperm(images, generator=generator).tolist()
        for start in range(0, images, fit.batch_size):
            share = order[start : start + fit.batch_size][rank::world_size]
            parts = np.array_split(share, math.ceil(len(share) / fit.micro_batch)) if share else []
            steps.append([part.tolist() for part in parts])
    return steps


def count_steps(images: int, fit: FitRecipe) -> int:
    """Returns the number of optimiser steps."""
    return fit.epochs * math.ceil(images / fit.batch_size)


def require_enough(images: int, fit: FitRecipe, world_size: int) -> None:
    """Raises UserError if a process would have no image of a batch."""
    if min(images, fit.batch_size) < world_size:
        raise UserError(f"{world_size} processes for {images} images in batches of {fit.batch_size}; use fewer")
