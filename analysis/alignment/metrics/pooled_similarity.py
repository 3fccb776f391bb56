"""Similarity of layers with the vision tower and the teachers, over images: CKA and mutual k-NN.

Each image is the mean of its tokens. Mutual k-NN is that of Huh et al. (arXiv:2405.07987); chance is k / (n - 1);
between the projector's input and layer 0 it is the neighbour overlap of "Lost in Embeddings" (arXiv:2509.11986).
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from analysis.alignment.metrics.base import LAYER, TEACHER, TOWER, LabelledBatch, Measure, ScoreRow, States
from analysis.alignment.metrics.similarity import (
    gram,
    matrix_cosine,
    nearest_neighbours,
    shared_neighbours,
    u_centred,
)
from analysis.alignment.metrics.word_match import derangement
from analysis.evaluation.forward_pass import ScoreAccumulator
from analysis.evaluation.jackknife import Jackknife
from analysis.evaluation.scores import EMPTY, POOLED, ScoreKey, Summary, Table
from probing.models.finite import finite_rows

logger = logging.getLogger(__name__)

MAX_IMAGES = 1024
"""Images that are compared, as many as in arXiv:2405.07987: the cost grows with their square."""
NEIGHBOURS = 10
"""As in arXiv:2405.07987; a quarter of the images where there are fewer than 40."""
GROUPS = 10
"""Groups of images for the jackknife of CKA."""
MIN_IMAGES = 4 + GROUPS
Pooled = dict[str, Tensor]
"""Mean state of each image (n, H), by name of layer, tower or teacher."""


class PooledSimilarity(Measure):
    """Stores the mean state of each image; `take_pooled` and `compare_pooled` do the rest."""

    sources = (LAYER, TOWER, TEACHER)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields mean states (b, H) of the images that are compared."""
        if batch.pooled:
            key = replace(states.key("", POOLED), layer=f"{states.source}:{states.name}")
            yield ScoreRow(key, states.values[: batch.pooled].mean(dim=1), states.finite[: batch.pooled])


def take_pooled(tally: ScoreAccumulator) -> tuple[Pooled, Pooled]:
    """Removes mean states from the tally; returns those of the layers, and of tower and teachers."""
    layers: Pooled = {}
    references: Pooled = {}
    for key in [key for key in tally.scores if key.metric == POOLED]:
        source, _, name = key.layer.partition(":")
        (layers if source == LAYER else references)[name] = torch.cat(tally.scores.pop(key))
    return layers, references


def neighbour_count(images: int) -> int:
    """Number k of nearest neighbours among this many images."""
    return min(NEIGHBOURS, max(1, images // 4))


def compare_pooled(layers: Pooled, references: Pooled, split: str) -> tuple[Table, list[Summary]]:
    """Compares every layer with every reference, over the images that are finite in both.

    In the control `permuted`, the reference's images are permuted. CKA has a delete-a-group jackknife: in a bootstrap,
    an image drawn twice would be its own neighbour.

    Args:
        layers: mean states by layer.
        references: mean states or targets by name, of the same images.
        split: where the images come from.

    Returns:
        Mutual k-NN per image, NaN where an image does not count; and a row for each CKA.
    """
    count = len(next(iter(layers.values())))
    if references and count < MIN_IMAGES:
        logger.warning("layers are compared with tower and teachers over at least %d images, not %d", MIN_IMAGES, count)
        return {}, []
    k = neighbour_count(count)
    table: Table = {}
    rows: list[Summary] = []
    too_few: dict[str, None] = {}
    for (some, own), (others, known) in itertools.product(_by_finite_images(layers), _by_finite_images(references)):
        images = own & known
        left, right = (
            {n: features[n][images] for n in names} for features, names in ((layers, some), (references, others))
        )
        enough = int(images.sum()) >= MIN_IMAGES
        too_few |= {} if enough else dict.fromkeys([*some, *others])
        overlaps = mutual_knn(left, right, k) if enough else {}
        jackknives = cka_jackknives(left, right) if enough else {}
        for layer, reference, control in itertools.product(some, others, ("none", "permuted")):
            pair, key = (layer, reference, control), ScoreKey(reference, layer, "", control, "cka")
            overlap = np.full(count, np.nan)
            overlap[images.numpy()] = overlaps.get(pair, np.nan)
            table[replace(key, metric="mutual_knn", variant=f"k={k}")] = overlap
            jackknife = jackknives.get(pair)
            interval = jackknife.interval() if jackknife else EMPTY
            rows.append(Summary(key, split, "0", interval, int(images.sum()), jackknife=jackknife))
    if too_few:
        logger.warning("too few images with finite states to compare layers with references: %s", ", ".join(too_few))
    return table, rows


Pair = tuple[str, str, str]
"""Layer, reference, control."""


def mutual_knn(layers: Pooled, references: Pooled, k: int) -> dict[Pair, Tensor]:
    """Fraction (n) of the k nearest images that a layer and a reference share."""
    own = {layer: nearest_neighbours(states, k) for layer, states in layers.items()}
    others = {name: nearest_neighbours(features, k) for name, features in _with_permuted(references).items()}
    return {
        (layer, *name): shared_neighbours(one, other)
        for (layer, one), (name, other) in itertools.product(own.items(), others.items())
    }


def cka_jackknives(layers: Pooled, references: Pooled) -> dict[Pair, Jackknife]:
    """Linear CKA of all images, and with each group of them left out."""
    own = {layer: gram(states) for layer, states in layers.items()}
    others = {name: gram(features) for name, features in _with_permuted(references).items()}
    group = torch.arange(len(next(iter(own.values())))) % GROUPS
    values: dict[Pair, list[float]] = {}
    for left_out in (-1, *range(GROUPS)):  # outermost: all centred matrices of one group fit in memory
        rest = (group != left_out).nonzero().flatten()
        centred = {name: u_centred(matrix[rest][:, rest]) for name, matrix in others.items()}
        for layer, matrix in own.items():
            one = u_centred(matrix[rest][:, rest])
            for name, other in centred.items():
                values.setdefault((layer, *name), []).append(matrix_cosine(one, other))
    return {pair: Jackknife(np.array(found[:1]), np.array(found[1:])[:, None]) for pair, found in values.items()}


def _with_permuted(references: Pooled) -> dict[tuple[str, str], Tensor]:
    """Features by name and control."""
    order = derangement(len(next(iter(references.values()))))
    return {
        (name, control): features[order] if control == "permuted" else features
        for name, features in references.items()
        for control in ("none", "permuted")
    }


def _by_finite_images(features: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Groups names whose features are finite for the same images, with the mask (n) of those images."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name, rows in features.items():
        groups.setdefault(tuple(finite_rows(rows).tolist()), []).append(name)
    return [(names, torch.tensor(mask)) for mask, names in groups.items()]
