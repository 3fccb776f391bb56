"""Mean intersection over union from one confusion matrix over a whole split."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.int64]
"""Pixels, (classes, classes + 1): a row per true class, a column per predicted class and one for no class at all."""


def confusion(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> Matrix:
    """Counts pixels by true and predicted class.

    Args:
        truth: (rows, columns) classes; anything outside 0 … classes - 1 is unlabeled and left out.
        found: (rows, columns) predicted classes; anything outside is a prediction of no class.
        classes: number of classes.

    Raises:
        ValueError: the maps have different sizes.
    """
    if truth.shape != found.shape:
        raise ValueError(f"truth has {truth.shape} pixels and the prediction {found.shape}")
    labelled = (truth >= 0) & (truth < classes)
    true, predicted = truth[labelled].astype(np.int64), found[labelled].astype(np.int64)
    predicted = np.where((predicted >= 0) & (predicted < classes), predicted, classes)
    flat = np.bincount(true * (classes + 1) + predicted, minlength=classes * (classes + 1))
    return flat.reshape(classes, classes + 1)


def class_iou(matrix: Matrix) -> NDArray[np.float64]:
    """Intersection over union per class (classes); NaN where a class is neither there nor predicted."""
    both = np.diagonal(matrix).astype(np.float64)
    union = matrix.sum(axis=1) + matrix.sum(axis=0)[: len(matrix)] - both
    return np.divide(both, union, out=np.full(len(matrix), np.nan), where=union > 0)


def mean_iou(matrix: Matrix) -> float:
    """Mean over the classes that occur in the truth (protocol `strict`); NaN where none does."""
    there = matrix.sum(axis=1) > 0
    return float(class_iou(matrix)[there].mean()) if there.any() else float("nan")
