"""Mean intersection over union from one confusion matrix over a whole split."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """Counts pixels by true and predicted class, on the device of the maps.

    Args:
        truth: (rows, columns) classes; anything outside 0 … classes - 1 is unlabeled.
        found: (rows, columns) predicted classes; anything outside is a prediction of no class.
        classes: number of classes.

    Returns:
        Pixels, (classes + 1, classes + 1): a row per true class and one for unlabeled pixels, a column per predicted
        class and one for no class.

    Raises:
        ValueError: the maps have different sizes.
    """
    if truth.shape != found.shape:
        raise ValueError(f"truth has {tuple(truth.shape)} pixels and the prediction {tuple(found.shape)}")
    true, predicted = (
        torch.where((labels >= 0) & (labels < classes), labels.long(), classes) for labels in (truth, found)
    )
    flat = torch.bincount((true * (classes + 1) + predicted).flatten(), minlength=(classes + 1) ** 2)
    return flat.view(classes + 1, classes + 1)


def class_counts(matrix: Tensor) -> Tensor:
    """What one image adds to a split's IoU: (3 · classes) pixels in both, in the truth, and in the prediction.

    Unlabeled pixels are left out, of truth and prediction alike.
    """
    labelled = matrix[:-1]
    return torch.cat([labelled.diagonal(), labelled.sum(dim=1), labelled.sum(dim=0)[:-1]])


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


def paper_iou(matrix: Tensor) -> Tensor:
    """Mean IoU of one image as OLA-VLM's released evaluation computes it (protocol `paper`).

    The mean is over the classes of this image's truth, and what is predicted on unlabeled pixels counts in the union.

    Args:
        matrix: of one image, from `confusion`.

    Returns:
        A number, 0 where the truth has no class.
    """
    matrix = matrix.double()
    both, true, found = matrix.diagonal()[:-1], matrix[:-1].sum(dim=1), matrix.sum(dim=0)[:-1]
    there = true > 0
    return (both[there] / (true + found - both)[there]).sum() / there.sum().clamp(min=1)
