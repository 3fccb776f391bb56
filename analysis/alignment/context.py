"""The model under study, the images, and the words of their labels: what all alignment measures share."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.alignment.recipe import AlignRecipe
from probing.data.coco import ImageList
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.data.image_modes import Size
from probing.data.instances import Instances, labels_on
from probing.data.panoptic import Panoptic
from probing.data.patch_labels import patch_shares, plain_name, word_numbers
from probing.models import Backbone, parse_layers
from probing.models.word_embeddings import word_vectors
from probing.teachers.base import Teacher


@dataclass(frozen=True)
class Annotator:
    """Maps an image name to the fraction of each patch that each word's class covers, (P, K)."""

    maps: Panoptic | Instances
    grid: tuple[int, int]

    @functools.cached_property
    def words(self) -> list[str]:
        """One word per class; classes of the same name share one."""
        return list(dict.fromkeys(map(plain_name, self.maps.names)))

    @functools.cached_property
    def _word_indices(self) -> NDArray[np.int64]:
        return word_numbers(self.maps.names, self.words)

    def __call__(self, name: str, size: Size | None = None) -> Tensor:
        """Reads the label map of an image of this width and height; raises OSError where it does not fit."""
        labels = self._word_indices[self.maps.labels(name) if size is None else labels_on(self.maps, name, size)]
        return torch.from_numpy(patch_shares(labels, len(self.words), self.grid)).float()


class AlignmentContext:
    """A model, and what its layers are compared with.

    Args:
        model: with its output embeddings.
        images: of the split.
        maps: their annotations.
        teachers: whose features every layer is compared with.
        recipe: the whole run.
    """

    def __init__(
        self,
        model: Backbone,
        images: ImageList,
        maps: Panoptic | Instances,
        teachers: dict[str, Teacher],
        recipe: AlignRecipe,
    ) -> None:
        self.model, self.images, self.teachers, self.recipe = model, images, teachers, recipe
        self.layers = parse_layers(recipe.layers, model.layers)
        inputs = cast(Any, model.prepare)
        self.annotate, self.tokenizer = Annotator(maps, inputs.grid), inputs.processor.tokenizer
        assert model.words is not None
        self.vocabulary = cast(Tensor, model.words.weight).detach()
        words = word_vectors(self.tokenizer, self.vocabulary, self.annotate.words)
        self.label_words = {"raw": words, "centred": words - self.vocabulary.float().mean(dim=0)}
        self.random_projector = _reinitialised(model.projector)
        patches = inputs.grid[0] * inputs.grid[1]
        self.patch_order = torch.randperm(patches, generator=torch.Generator().manual_seed(0))

    def read(self, plan: list[list[int]], with_teachers: bool = True) -> Iterator[Prepared]:
        """Yields batches of images with the annotations of their patches."""
        teachers = {name: teacher.prepare for name, teacher in self.teachers.items()} if with_teachers else {}
        dataset = MicroBatches(self.images, plan, self.model.prepare, teachers, annotate=self.annotate)
        return micro_batches(dataset, self.recipe.workers, self.model.device)

    @contextlib.contextmanager
    def projector_inputs(self, images: int) -> Iterator[list[Tensor]]:
        """Collects the projector's input, (B, P, C), during a forward pass; nothing if it is not a row per image."""
        collected: list[Tensor] = []

        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and args[0].dim() == 3 and args[0].shape[0] == images:
                collected.append(args[0].detach())

        projector = self.model.projector
        handle = projector.register_forward_pre_hook(collect) if projector is not None else None
        try:
            yield collected
        finally:
            if handle is not None:
                handle.remove()


def _reinitialised(projector: nn.Module | None) -> nn.Module | None:
    """Copies a projector with random weights; None where it has no linear layer."""
    if projector is None or not any(isinstance(module, nn.Linear) for module in projector.modules()):
        return None
    projector = copy.deepcopy(projector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return projector
