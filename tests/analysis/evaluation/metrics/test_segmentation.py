"""One confusion matrix, against scikit-learn's and pixel by pixel."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from analysis.evaluation.metrics.segmentation import class_counts, class_iou, confusion, mean_iou, paper_iou


def maps(rng, classes, size=(13, 17)):
    return [torch.from_numpy(one) for one in rng.integers(0, classes, size=(2, *size))]


def test_it_counts_as_scikit_learn_does():
    truth, found = maps(np.random.default_rng(0), 8)
    truth[truth == 7], found[found == 6] = 255, 255
    # Whatever is no class is called 6 on either side.
    true, predicted = (np.where(m.numpy().ravel() < 6, m.numpy().ravel(), 6) for m in (truth, found))
    expected = confusion_matrix(true, predicted, labels=range(7))
    assert (confusion(truth.to(torch.uint8), found.to(torch.uint8), 6).numpy() == expected).all()


def test_mean_iou_is_scikit_learns_over_all_pixels_of_a_split():
    rng = np.random.default_rng(1)
    pairs = [maps(rng, 5) for _ in range(4)]
    for truth, _ in pairs:
        truth[:3] = 255
    totals = sum(class_counts(confusion(t, f, 5)) for t, f in pairs).numpy()
    true, predicted = (np.concatenate([pair[i][3:].numpy().ravel() for pair in pairs]) for i in (0, 1))
    expected = jaccard_score(true, predicted, labels=range(5), average=None)
    np.testing.assert_allclose(class_iou(totals), expected, rtol=1e-6)
    assert mean_iou(totals) == pytest.approx(expected.mean(), rel=1e-6)


def test_paper_mean_is_per_image_with_unlabeled_pixels_in_union():
    truth, found = maps(np.random.default_rng(2), 6)
    truth[truth == 5] = 255
    there = [c for c in truth.unique().tolist() if c != 255]
    iou = [((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in there]
    assert paper_iou(confusion(truth, found, 6)).item() == pytest.approx(float(np.mean(iou)), rel=1e-6)
    assert paper_iou(confusion(torch.full((2, 2), 255), torch.zeros(2, 2), 6)) == 0


def iou(truth, found, classes):
    return mean_iou(class_counts(confusion(torch.tensor(truth), torch.tensor(found), classes)).numpy())


def test_absent_classes_count_only_if_predicted():
    assert iou([[0, 0], [0, 0]], [[0, 0], [0, 2]], 4) == 0.75
    assert np.isnan(iou([[255]], [[0]], 4))


def test_prediction_on_unlabeled_pixels_is_left_out():
    assert iou([[0, 255]], [[0, 0]], 1) == 1.0


def test_maps_of_different_sizes():
    with pytest.raises(ValueError, match="pixels"):
        confusion(torch.zeros(2, 2), torch.zeros(2, 3), 2)
