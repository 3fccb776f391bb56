"""Images and learning rate of each training step."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from probing.recipe import FitRecipe
from probing.utils.errors import UserError

MIN_WINDOW = 3
"""Least number of batches that the activation buffer holds."""


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Returns the rate of a 0-based step: linear warm-up over a fraction of the steps, then a cosine to zero."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


@dataclass(frozen=True)
class Step:
    """One optimiser step of one process.

    Attributes:
        micros: image indices of each micro-batch.
        first: whether the images are visited for the first time.
    """

    micros: list[list[int]]
    first: bool


def plan_steps(images: int, fit: FitRecipe, rank: int = 0, world_size: int = 1, window: int = 0) -> list[Step]:
    """Plans the steps of one process.

    The order depends only on the first seed, so a resumed run needs no sampler state.

    Args:
        images: number of training images.
        fit: section of the recipe.
        rank: of the process.
        world_size: number of processes that divide each batch.
        window: images that the activation buffer holds; 0 for no buffer. With one, an image stays with the process that
            visits it first.
    """
    first, *later = [_batches(_order(images, fit, epoch), fit.batch_size) for epoch in range(fit.epochs)]
    planned = [(batch, True) for batch in first] + [(batch, False) for epoch in later for batch in epoch]
    if 0 < window < images:
        planned = _interleave(first, images, fit, window)
    owner = {image: position % world_size for batch in first for position, image in enumerate(batch)}
    steps = []
    for batch, is_first in planned:
        share = [image for image in batch if owner[image] == rank] if window else batch[rank::world_size]
        parts = np.array_split(share, math.ceil(len(share) / fit.micro_batch)) if share else []
        steps.append(Step([part.tolist() for part in parts], is_first))
    return steps


def _order(images: int, fit: FitRecipe, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(fit.seeds[0] * 1_000_003 + epoch)
    return torch.randperm(images, generator=generator).tolist()


def _batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _interleave(first: list[list[int]], images: int, fit: FitRecipe, window: int) -> list[tuple[list[int], bool]]:
    """Spreads the later visits of each image evenly over the time in which the buffer holds it.

    Time is counted in batches of new images. An image of batch b is due again at
    b + width * (visit - u) / (epochs - 1) with its own random u in [0, 1), so that old and new images are mixed. A
    batch has no image twice.
    """
    width = window // fit.batch_size - 2  # one batch is new, and one waits to be complete
    offsets = np.random.default_rng(fit.seeds[0]).random(images)
    due = sorted(
        (number + width * (visit - offsets[image]) / (fit.epochs - 1), image)
        for number, batch in enumerate(first)
        for image in batch
        for visit in range(1, fit.epochs)
    )
    planned, batch, begun = list[tuple[list[int], bool]](), list[int](), 0
    for time, image in due:
        while begun < min(time, len(first)):
            planned.append((first[begun], True))
            begun += 1
        if len(batch) == fit.batch_size or image in batch:
            planned.append((batch, False))
            batch = []
        batch.append(image)
    return [*planned, (batch, False)]


def last_visits(steps: list[Step]) -> list[list[int]]:
    """Returns, for each step, the images that no later step visits."""
    last = {image: number for number, step in enumerate(steps) for micro in step.micros for image in micro}
    leaving: list[list[int]] = [[] for _ in steps]
    for image, number in last.items():
        leaving[number].append(image)
    return leaving


def count_steps(images: int, fit: FitRecipe) -> int:
    """Returns the number of optimiser steps without a buffer; with one, up to `epochs` fewer."""
    return fit.epochs * math.ceil(images / fit.batch_size)


def require_enough(images: int, fit: FitRecipe, world_size: int) -> None:
    """Raises UserError if a process has fewer than two images of a batch, to pair for the shuffled control."""
    if min(images, fit.batch_size) < 2 * world_size:
        raise UserError(
            f"{world_size} processes for {images} images in batches of {fit.batch_size}; use fewer, two images each"
        )
