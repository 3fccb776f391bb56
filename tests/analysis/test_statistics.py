import numpy as np
import pytest
from scipy.stats import bootstrap

from analysis.statistics import bootstrap_mean

SCORES = np.random.default_rng(0).gamma(2.0, 0.2, 300)


def test_agrees_with_scipy():
    reference = bootstrap((SCORES,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    ours = bootstrap_mean(SCORES, resamples=4000)
    assert ours.value == pytest.approx(SCORES.mean())
    width = reference.high - reference.low
    assert abs(ours.low - reference.low) < 0.05 * width and abs(ours.high - reference.high) < 0.05 * width


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        found = bootstrap_mean(rng.normal(1.0, 1.0, 60), resamples=400)
        hits += found.low <= 1.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_seeds_that_differ_widen_the_interval():
    offsets = np.array([[-0.2], [0.0], [0.2]])
    one, three = bootstrap_mean(SCORES), bootstrap_mean(SCORES + offsets)
    assert three.value == pytest.approx(one.value)
    assert three.high - three.low > 2 * (one.high - one.low)


def test_the_same_scores_give_the_same_interval():
    assert bootstrap_mean(SCORES) == bootstrap_mean(SCORES)


@pytest.mark.parametrize("scores", [np.array([]), np.array([1.0, np.nan])])
def test_what_cannot_be_bootstrapped(scores):
    with pytest.raises(ValueError, match="cannot bootstrap"):
        bootstrap_mean(scores)
