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


def class_counts(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """What one image adds to a split's IoU: (3 · classes) pixels in both, in the truth, and in the prediction."""
    matrix = confusion(truth, found, classes)
    return np.concatenate([np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)[:classes]])


def iou_of_counts(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean IoU over the classes of the truth, from sums (…, 3 · classes) of `class_counts`."""
    both, true, found = np.split(totals, 3, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(true > 0, both / (true + found - both), 0.0)
        return iou.sum(axis=-1) / (true > 0).sum(axis=-1)


def paper_iou(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> float:
    """Mean IoU of one image as OLA-VLM's released evaluation computes it (protocol `paper`).

    The mean is over the classes of this image's truth, and what is predicted on unlabeled pixels counts in the union.
    """
    there = [c for c in np.unique(truth) if c < classes]
    iou = [((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in there]
    return float(np.mean(iou)) if iou else 0.0
