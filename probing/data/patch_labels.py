"""Computes from label maps which class each patch of an image shows, and the word for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COVERAGE = 0.5
"""Share of a patch that a class must cover to be its label."""
_NOT_WORDS = {"merged", "other", "stuff"}


def patch_shares(labels: NDArray[np.integer[Any]], classes: int, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Computes the share of every patch that each class covers.

    Args:
        labels: class of every pixel, (rows, columns); values from `classes` on are no class.
        classes: number of classes K.
        grid: rows and columns of the patches, which tile the whole map.

    Returns:
        (patches, K), row-major; a row's sum lacks the pixels of no class.
    """
    (height, width), (rows, columns) = labels.shape, grid
    # A pixel belongs to the patch that contains its centre.
    row = ((np.arange(height) + 0.5) * rows / height).astype(int)
    column = ((np.arange(width) + 0.5) * columns / width).astype(int)
    patch = row[:, None] * columns + column
    index = patch * (classes + 1) + np.minimum(labels, classes).astype(int)
    counts = np.bincount(index.ravel(), minlength=rows * columns * (classes + 1)).reshape(rows * columns, classes + 1)
    shares: NDArray[np.float64] = counts[:, :classes] / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def patch_labels(shares: NDArray[np.floating], coverage: float = COVERAGE) -> NDArray[np.int64]:
    """Returns the class that covers most of each patch, (patches); -1 where it covers less than `coverage`."""
    best = shares.argmax(axis=1)
    return np.where(shares.max(axis=1) >= coverage, best, -1)


def word_numbers(names: Sequence[str], words: Sequence[str]) -> NDArray[np.int64]:
    """Maps every value of a label map, (256), to the index of its class's word; to len(words) if it is no class."""
    table = np.full(256, len(words))
    table[: len(names)] = [words.index(plain_name(name)) for name in names]
    return table


def plain_name(name: str) -> str:
    """Shortens a class name to everyday words: COCO's `wall-other-merged` to wall, `floor-wood` to floor wood."""
    words = [word for word in name.replace("-", " ").replace("_", " ").split() if word not in _NOT_WORDS]
    return " ".join(words) or name
