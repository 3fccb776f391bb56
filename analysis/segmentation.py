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


def class_counts(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """What one image adds to a split's IoU: (3 · classes) pixels in both, in the truth, and in the prediction."""
    matrix = confusion(truth, found, classes)
    return np.concatenate([np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)[:classes]])


def class_iou(totals: NDArray[np.floating]) -> NDArray[np.float64]:
    """IoU per class (…, classes), from sums (…, 3 · classes) of `class_counts`; NaN for a class that is nowhere."""
    both, true, found = np.split(np.asarray(totals, dtype=np.float64), 3, axis=-1)
    union = true + found - both
    return np.divide(both, union, out=np.full_like(union, np.nan), where=union > 0)


def mean_iou(totals: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean of `class_iou` over the classes that occur in the truth (…); NaN where none does."""
    there = np.split(totals, 3, axis=-1)[1] > 0
    number = there.sum(axis=-1).astype(np.float64)
    total = np.where(there, class_iou(totals), 0.0).sum(axis=-1)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def paper_iou(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> float:
    """Mean IoU of one image as OLA-VLM's released evaluation computes it (protocol `paper`).

    The mean is over the classes of this image's truth, and what is predicted on unlabeled pixels counts in the union.
    """
    there = [c for c in np.unique(truth) if c < classes]
    iou = [((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in there]
    return float(np.mean(iou)) if iou else 0.0
