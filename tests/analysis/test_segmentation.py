"""One confusion matrix, counted pixel by pixel and by scikit-learn's rules."""

import numpy as np
import pytest

from analysis.segmentation import class_counts, class_iou, confusion, mean_iou


def test_it_counts_every_labelled_pixel_once():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 8, size=(2, 13, 17))
    truth[truth == 7], found[found == 6] = 255, 255
    expected = np.zeros((6, 7), dtype=int)
    for t, f in zip(truth.ravel(), found.ravel(), strict=True):
        if t < 6:
            expected[t, f if f < 6 else 6] += 1
    assert (confusion(truth, found, 6) == expected).all()


def test_iou_is_that_of_the_sets_of_pixels():
    rng = np.random.default_rng(1)
    truth, found = rng.integers(0, 5, size=(2, 20, 20))
    truth[:3] = 255
    kept = truth != 255
    expected = [((truth == c) & (found == c))[kept].sum() / ((truth == c) | (found == c))[kept].sum() for c in range(5)]
    counts = class_counts(truth, found, 5)
    np.testing.assert_allclose(class_iou(counts), expected)
    assert mean_iou(counts) == pytest.approx(np.mean(expected))


def test_classes_that_are_not_there_do_not_count_but_predicting_them_costs():
    truth = np.zeros((2, 2), dtype=int)
    assert mean_iou(class_counts(truth, np.array([[0, 0], [0, 2]]), 4)) == 0.75
    assert np.isnan(mean_iou(class_counts(np.full((2, 2), 255), truth, 4)))


def test_prediction_on_unlabeled_pixels_is_left_out():
    truth = np.array([[0, 255]])
    assert mean_iou(class_counts(truth, np.array([[0, 0]]), 1)) == 1.0


def test_maps_of_different_sizes():
    with pytest.raises(ValueError, match="pixels"):
        confusion(np.zeros((2, 2), dtype=int), np.zeros((2, 3), dtype=int), 2)
