import numpy as np
import pytest
from scipy import stats

from analysis.evaluation.bootstrap import bootstrap, paired_bootstrap
from analysis.evaluation.metrics.segmentation import mean_iou

SCORES = np.random.default_rng(0).gamma(2.0, 0.2, 300)


def test_agrees_with_scipy():
    reference = stats.bootstrap((SCORES,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    ours = bootstrap(SCORES[None], resamples=4000)
    assert ours.value == pytest.approx(SCORES.mean())
    width = reference.high - reference.low
    assert abs(ours.low - reference.low) < 0.05 * width and abs(ours.high - reference.high) < 0.05 * width


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        found = bootstrap(rng.normal(1.0, 1.0, (1, 60)), resamples=400)
        hits += found.low <= 1.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_seeds_that_differ_widen_the_interval():
    offsets = np.array([[-0.2], [0.0], [0.2]])
    one, three = bootstrap(SCORES[None]), bootstrap(SCORES + offsets)
    assert three.value == pytest.approx(one.value)
    assert three.high - three.low > 2 * (one.high - one.low)


def test_the_same_scores_give_the_same_interval():
    assert bootstrap(SCORES[None]) == bootstrap(SCORES[None])


def test_one_image_has_no_interval():
    """Its resamples are all alike, also with several seeds."""
    one = SCORES[:3, None]
    for found in (bootstrap(one), paired_bootstrap(one, one - 1), paired_bootstrap(one, one - 1, seeds_paired=True)):
        assert np.isfinite(found.value) and np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("scores", [np.zeros((1, 0)), np.array([[1.0, np.nan]])])
def test_what_cannot_be_bootstrapped(scores):
    with pytest.raises(ValueError, match="cannot bootstrap"):
        bootstrap(scores)


def test_a_statistic_of_sums_is_that_of_the_resampled_images():
    """Against a loop that draws images one by one and counts their pixels anew."""
    rng = np.random.default_rng(5)
    both = rng.integers(0, 30, (40, 3))
    table = np.concatenate([both, both + rng.integers(1, 30, (40, 3)), both + rng.integers(0, 30, (40, 3))], axis=1)
    draws = []
    for _ in range(3000):
        inter, true, found = table[rng.integers(0, 40, 40)].sum(axis=0).reshape(3, 3)
        draws.append((inter / (true + found - inter)).mean())
    low, high = np.percentile(draws, [2.5, 97.5])
    ours = bootstrap(table[None], mean_iou)
    inter, true, found = table.sum(axis=0).reshape(3, 3)
    assert ours.value == pytest.approx((inter / (true + found - inter)).mean())
    assert abs(ours.low - low) < 0.08 * (high - low) and abs(ours.high - high) < 0.08 * (high - low)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_handful_of_seeds_is_covered_as_often_as_it_says(seeds):
    """Nearly all the spread is between seeds; plain resampling of five would cover the truth 82 % of the time."""
    rng = np.random.default_rng(seeds)
    hits = 0
    for _ in range(400):
        scores = 1.0 + rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 0.1, (seeds, 40))
        found = bootstrap(scores, resamples=500)
        hits += found.low <= 1.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_pairs_of_seeds_take_out_what_they_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1, (5, 1))
    one = shared + rng.normal(0, 0.1, (5, 50))
    two = shared + 0.2 + rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 0.1, (5, 50))
    together, apart = (paired_bootstrap(two, one, seeds_paired=paired) for paired in (True, False))
    spread = stats.ttest_1samp((two - one).mean(axis=1), 0).confidence_interval(0.95)
    assert together.low > 0 > apart.low and together.value == apart.value
    assert together.high - together.low == pytest.approx(spread.high - spread.low, rel=0.35)
    with pytest.raises(ValueError, match="5 seeds cannot be paired with 4"):
        paired_bootstrap(two, one[:4], seeds_paired=True)
