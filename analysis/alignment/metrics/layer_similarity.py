"""How alike are the pictures to two parts of a system: every layer's image tokens beside the tower's and the teachers'.

Items are images, each the mean of its tokens. Neighbours between what goes into the projector and layer 0 are the
connector's neighbour overlap of "Lost in Embeddings" (arXiv:2509.11986).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.alignment.metrics.patch_words import derangement
from analysis.alignment.metrics.similarity import (
    gram,
    matrix_cosine,
    nearest_neighbours,
    shared_neighbours,
    u_centred,
)
from analysis.evaluation.metrics.frechet import Jackknife
from analysis.evaluation.scores import ScoreKey

ITEMS = 1024
"""Images that are compared, the first ones (as many as arXiv:2405.07987): the cost grows with their square."""
NEIGHBOURS = 10
"""As in arXiv:2405.07987; fewer where there are hardly more images."""
GROUPS = 10
"""Of images, left out in turn for the interval of a CKA."""
LEAST = 4 + GROUPS
"""Fewer images are not compared."""


def neighbours(images: int) -> int:
    """Number k of nearest neighbours among that many images."""
    return min(NEIGHBOURS, max(1, images // 4))


@dataclass(frozen=True)
class Likeness:
    """One number between a layer and a reference.

    Attributes:
        curve: what it is.
        shares: of neighbours kept, one per image, (n).
        jackknife: of a CKA.
    """

    curve: ScoreKey
    shares: Tensor | None = None
    jackknife: Jackknife | None = None


def likeness(
    layers: Mapping[str, Tensor], references: Mapping[str, Tensor], whole: int | None = None
) -> Iterator[Likeness]:
    """Unbiased linear CKA and mutual k-NN of every layer with every reference, and with its images permuted.

    A bootstrap would not do: an image drawn twice is its own neighbour. CKA has a delete-a-group jackknife instead.

    Args:
        layers: by name, (n, H).
        references: by name, (n, D), of the same images.
        whole: number of images that other layers are compared over, where some are left out of these; the number of
            neighbours follows from it, so that all layers have the same.
    """
    n = len(next(iter(layers.values())))
    whole = whole or n
    k = min(neighbours(whole), n - 1)
    order = derangement(n)
    arms = [(name, control, own[order] if control == "permuted" else own)
            for name, own in references.items() for control in ("none", "permuted")]  # fmt: skip
    near = {layer: nearest_neighbours(states, k) for layer, states in layers.items()}
    for reference, control, features in arms:
        others = nearest_neighbours(features, k)
        for layer, own in near.items():
            curve = ScoreKey(reference, layer, "", control, "mutual_knn", variant=f"k={k}")
            yield Likeness(curve, shares=shared_neighbours(own, others))
    for (layer, reference, control), jackknife in _jackknives(layers, arms).items():
        curve = ScoreKey(reference, layer, "", control, "cka")
        yield Likeness(curve, jackknife=jackknife)


def _jackknives(
    layers: Mapping[str, Tensor], arms: list[tuple[str, str, Tensor]]
) -> dict[tuple[str, str, str], Jackknife]:
    """CKA of all images, and with each group of them left out; a Gram matrix is computed once."""
    states = {layer: gram(features) for layer, features in layers.items()}
    others = {(name, control): gram(features) for name, control, features in arms}
    n = len(next(iter(states.values())))
    place = torch.arange(n) % GROUPS
    values: dict[tuple[str, str, str], list[float]] = {}
    for group in (-1, *range(GROUPS)):
        kept = (place != group).nonzero().flatten()
        references = {key: u_centred(matrix[kept][:, kept]) for key, matrix in others.items()}
        for layer, matrix in states.items():
            own = u_centred(matrix[kept][:, kept])
            for (name, control), reference in references.items():
                values.setdefault((layer, name, control), []).append(matrix_cosine(own, reference))
    return {key: Jackknife(np.array(found[:1]), np.array(found[1:])[:, None]) for key, found in values.items()}
