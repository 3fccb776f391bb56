"""Hidden states and targets of a window of images, held for the later visits of the same images.

With it, a run of several epochs computes each image's states once. Activation stores of sparse autoencoders do the same
for single tokens; a window of one batch is data echoing (Choi et al., 2019, arXiv:1907.05550).
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from probing.data.coco import ImageList, first_image
from probing.data.dataloader import Prepared
from probing.models.base import Backbone, Layer
from probing.recipe import FitRecipe, ProbeRunRecipe
from probing.teachers import Teacher
from probing.training.schedule import MIN_WINDOW
from probing.utils.errors import UserError

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Fraction of the free memory that `fit.buffer=auto` takes."""

SAFE_SHARE = 0.25
"""Fraction of the images whose repeated visits trained as ordinary epochs do; see tests/benchmarks/README.md."""


@dataclass(frozen=True)
class _Stored:
    """What is held of one image: states (layers, T, H), and targets (N, D) by teacher."""

    states: Tensor
    targets: dict[str, Tensor]


@dataclass
class ActivationBuffer:
    """Holds the states that probes read, in the checkpoint's dtype.

    Those of a CUDA device are in page-locked memory of the host. Copies do not wait for the device, so that it must be
    waited for (as every optimiser step does) between adding an image and reading it.

    Attributes:
        layers: probed layers.
        device: of the probes.
        images: by index.
    """

    layers: Sequence[Layer]
    device: torch.device
    images: dict[int, _Stored] = field(default_factory=dict)

    def add_targets(self, indices: Sequence[int], targets: dict[str, Tensor]) -> None:
        """Adds images with their targets (B, N, D); states follow layer by layer."""
        for row, index in enumerate(indices):
            own = {name: target[row] for name, target in targets.items()}
            held = {name: self._room(target).copy_(target, non_blocking=True) for name, target in own.items()}
            self.images[index] = _Stored(torch.empty(0), held)

    def add_states(self, indices: Sequence[int], layer: Layer, states: Tensor, positions: Sequence[Tensor]) -> None:
        """Adds one layer's states (B, T, H) of new images, at each image's positions."""
        number = self.layers.index(layer)
        for row, (index, chosen) in enumerate(zip(indices, positions, strict=True)):
            own = states[row].index_select(0, chosen.to(states.device, non_blocking=True))
            stored = self.images[index]
            if not stored.states.numel():
                stored = self.images[index] = _Stored(self._room(own, len(self.layers)), stored.targets)
            stored.states[number].copy_(own, non_blocking=True)

    def prepared(self, indices: Sequence[int]) -> Prepared:
        """Returns the targets of those images that are held, as a micro-batch without inputs."""
        held = [index for index in indices if index in self.images]  # unreadable images are not
        names = self.images[held[0]].targets if held else ()
        rows = {name: [self.images[index].targets[name] for index in held] for name in names}
        targets = {n: torch.stack([row.to(self.device, non_blocking=True) for row in own]) for n, own in rows.items()}
        return Prepared(held, None, {}, [], cached_targets=targets)

    def states(self, indices: Sequence[int], layer: Layer) -> tuple[Tensor, Tensor | None]:
        """Returns states (B, T, H) of one layer on the probes' device, and a mask (B, T) unless all are valid."""
        number = self.layers.index(layer)
        rows = [self.images[index].states[number].to(self.device, non_blocking=True) for index in indices]
        if len({len(row) for row in rows}) == 1:
            return torch.stack(rows), None
        states = pad_sequence(rows, batch_first=True)
        mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return states, mask.to(self.device, non_blocking=True)

    def drop(self, indices: Iterable[int]) -> None:
        """Frees images."""
        for index in indices:
            self.images.pop(index, None)

    def _room(self, like: Tensor, *copies: int) -> Tensor:
        pinned = self.device.type == "cuda"
        device = torch.device("cpu") if pinned else self.device
        return torch.empty(*copies, *like.shape, dtype=like.dtype, device=device, pin_memory=pinned)


def plan_window(
    recipe: ProbeRunRecipe,
    backbone: Backbone,
    teachers: Iterable[Teacher],
    layers: Sequence[Layer],
    images: ImageList,
    processes: int = 1,
) -> int:
    """Returns the number of images that the buffers of all processes hold; 0 for no buffer.

    All images are taken to have as many tokens as the first.

    Raises:
        UserError: as `choose_window`.
    """
    if recipe.fit.buffer == "off" or recipe.fit.epochs == 1:
        return 0
    tokens = backbone.prepare([first_image(images, recipe.data.view)]).tokens
    states = int(tokens.mask(*recipe.probe.keys).sum()) * len(layers) * backbone.hidden_size
    blocks = [states * next(backbone.core.parameters()).dtype.itemsize]
    blocks += [4 * math.prod(teacher.shape) for teacher in teachers]
    if backbone.device.type == "cuda":
        blocks = [1 << (size - 1).bit_length() for size in blocks]  # as torch rounds page-locked memory
    per_image = sum(blocks)
    return choose_window(recipe.fit, len(images), per_image, processes)


def choose_window(fit: FitRecipe, images: int, per_image: int, processes: int = 1) -> int:
    """Returns the number of images that the buffers of all processes hold; 0 for no buffer.

    Args:
        fit: section of the recipe, with `buffer` other than `off`.
        images: number of training images.
        per_image: bytes that are held of one.
        processes: that divide the images.

    Raises:
        UserError: the memory that `fit.buffer` states holds fewer than three batches.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = MEMORY_SHARE * psutil.virtual_memory().available / local
    budget = free if isinstance(fit.buffer, str) else 1e9 * fit.buffer
    window = min(images, int(processes * budget / per_image))
    smallest = min(images, MIN_WINDOW * fit.batch_size)
    needed = smallest * per_image / processes / 1e9
    if window >= smallest:
        size = window * per_image / processes / 1e9
        logger.info("the buffer holds %d of %d images (%.2g GB per process)", window, images, size)
        if window < SAFE_SHARE * images and fit.epochs > 2:
            logger.warning("a buffer of so few images may train worse probes; lower fit.epochs or set fit.buffer=off")
        return window
    if not isinstance(fit.buffer, str):
        raise UserError(f"fit.buffer={fit.buffer:g} is below {MIN_WINDOW} batches; give {needed:.2g} GB or more")
    logger.info("no buffer: %d batches need %.2g GB, and half of the free memory is %.2g", MIN_WINDOW, needed,
                budget / 1e9)  # fmt: skip
    return 0
