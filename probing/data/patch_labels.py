"""From label maps to what each patch of an image shows, and to the words for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COVERAGE = 0.5
"""Share of a patch that a class must cover to be its label."""
_NO_WORDS = {"merged", "other", "stuff"}


def patch_shares(labels: NDArray[np.integer[Any]], classes: int, grid: tuple[int, int]) -> NDArray[np.float64]:
    """How much of every patch each class covers.

    Args:
        labels: class of every pixel, (rows, columns); numbers from `classes` on are none.
        classes: number of classes K.
        grid: rows and columns of the patches, which tile the whole map.

    Returns:
        (patches, K), row-major; what belongs to no class is missing from a row's sum.
    """
    (height, width), (rows, columns) = labels.shape, grid
    # A pixel belongs to the patch that its centre lies in.
    row = ((np.arange(height) + 0.5) * rows / height).astype(int)
    column = ((np.arange(width) + 0.5) * columns / width).astype(int)
    patch = row[:, None] * columns + column
    kind = np.minimum(labels, classes).astype(int)
    counts = np.bincount((patch * (classes + 1) + kind).ravel(), minlength=rows * columns * (classes + 1))
    table = counts.reshape(rows * columns, classes + 1)
    shares: NDArray[np.float64] = table[:, :classes] / np.maximum(table.sum(axis=1, keepdims=True), 1)
    return shares


def patch_labels(shares: NDArray[np.floating], coverage: float = COVERAGE) -> NDArray[np.int64]:
    """The class of every patch, (patches); -1 where none covers enough of it.

    Args:
        shares: from `patch_shares`.
        coverage: share of the patch that a class must cover, above 0; the largest counts.
    """
    best = shares.argmax(axis=1)
    enough = shares[np.arange(len(shares)), best] >= coverage
    return np.where(enough, best, -1)


def word_numbers(names: Sequence[str], words: Sequence[str]) -> NDArray[np.int64]:
    """Which of some words each class of a label map is called by, for every value that a map may have.

    Args:
        names: of the classes.
        words: among them the plain name of every class; two classes may have the same.

    Returns:
        (256), the number of a word; the number of words where a value is no class.
    """
    number = {word: index for index, word in enumerate(words)}
    table = np.full(256, len(words))
    table[: len(names)] = [number[plain_name(name)] for name in names]
    return table


def plain_name(name: str) -> str:
    """A class name as one would say it: COCO's `wall-other-merged` is a wall, `floor-wood` floor wood."""
    words = [word for word in name.replace("-", " ").replace("_", " ").split() if word not in _NO_WORDS]
    return " ".join(words) or name
