"""From label maps to what each patch of an image shows, and to the words for it."""

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


def patch_labels(shares: NDArray[np.float64], coverage: float = COVERAGE) -> NDArray[np.int64]:
    """The class of every patch, (patches); -1 where none covers enough of it.

    Args:
        shares: from `patch_shares`.
        coverage: share of the patch that a class must cover, above 0; the largest counts.
    """
    best = shares.argmax(axis=1)
    enough = shares[np.arange(len(shares)), best] >= coverage
    return np.where(enough, best, -1)


def plain_name(name: str) -> str:
    """A class name as one would say it: COCO's `wall-other-merged` is a wall, `floor-wood` floor wood."""
    words = [word for word in name.replace("-", " ").replace("_", " ").split() if word not in _NO_WORDS]
    return " ".join(words) or name
