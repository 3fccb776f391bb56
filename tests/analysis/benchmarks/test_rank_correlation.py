"""Rank correlations against scipy's, with and without ties, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.benchmarks.rank_correlation import kendall, rank_correlation, spearman

NUMBERS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12)


@given(NUMBERS)
def test_coefficients_equal_scipy(pairs):
    one, two = np.array(pairs, dtype=float).T
    if len(set(one)) < 2 or len(set(two)) < 2:
        assert np.isnan(spearman(one, two)) and np.isnan(kendall(one, two))
        return
    assert spearman(one, two) == pytest.approx(stats.spearmanr(one, two).statistic)
    assert kendall(one, two) == pytest.approx(stats.kendalltau(one, two).statistic)


def test_interval_equals_a_plain_bootstrap():
    """Against a plain loop over the same draws through scipy."""
    rng = np.random.default_rng(3)
    one = rng.normal(size=9)
    two = one + rng.normal(size=9)
    found = rank_correlation(one, two, resamples=200, seed=5)
    drawn = np.random.default_rng(5).integers(9, size=(200, 9))
    for interval, oracle in ((found.rho, stats.spearmanr), (found.tau, stats.kendalltau)):
        values = [oracle(one[places], two[places]).statistic for places in drawn]
        assert interval.value == pytest.approx(oracle(one, two).statistic)
        assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_strong_order_differs_from_none():
    rng = np.random.default_rng(0)
    one = rng.normal(size=40)
    assert rank_correlation(one, one**3).rho.low == 1
    none = rank_correlation(one, rng.normal(size=40))
    assert none.rho.low < 0 < none.rho.high and none.tau.low < 0 < none.tau.high


@pytest.mark.parametrize("one", [[1, 2], [1, 1, 1], [1, np.nan, 2]])
def test_constant_or_missing_numbers_are_refused(one):
    with pytest.raises(ValueError, match="no rank correlation"):
        rank_correlation(np.array(one, dtype=float), np.arange(len(one)))
