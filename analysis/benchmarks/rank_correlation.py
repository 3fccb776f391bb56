"""Rank correlation of two numbers over checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.evaluation.bootstrap import LEVEL, RESAMPLES, Interval

LEAST, FEW = 3, 8
"""Below the first there is no correlation, below the second a warning: four checkpoints in random order have every pair
in order one time in 24."""


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ and Kendall's τ-b over `count` checkpoints."""

    rho: Interval
    tau: Interval
    count: int


def rank_correlation(
    one: NDArray[np.floating], two: NDArray[np.floating], resamples: int = RESAMPLES, seed: int = 0
) -> RankCorrelation:
    """Correlates two numbers of the same checkpoints, with percentile intervals over resampled checkpoints.

    Resamples in which one of the numbers is constant are ignored. Errors of the numbers are not in the intervals.

    Raises:
        ValueError: there are fewer than `LEAST` checkpoints, a number is not finite, or all are the same.
    """
    table = np.asarray([one, two], dtype=np.float64)
    count = table.shape[1]
    if count < LEAST or not np.isfinite(table).all() or (np.ptp(table, axis=1) == 0).any():
        raise ValueError(f"no rank correlation of {count} checkpoints; give {LEAST} finite numbers that differ")
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    return RankCorrelation(_interval(spearman, table, draws), _interval(kendall, table, draws), count)


def _interval(
    measure: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    table: NDArray[np.float64],
    draws: NDArray[np.int64],
) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(measure(*table[:, draws]), [tail, 100 - tail])
    return Interval(float(measure(*table)), float(low), float(high))


def spearman(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's ρ of rows, (…, n) → (…); NaN where a row is constant. Vectorised, unlike scipy's."""
    ranks = (stats.rankdata(values, axis=-1) for values in (one, two))
    return _cosine(*(rank - rank.mean(axis=-1, keepdims=True) for rank in ranks))


def kendall(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kendall's τ-b of rows, (…, n) → (…); NaN where a row is constant. Vectorised, unlike scipy's."""
    signs = (np.sign(values[..., :, None] - values[..., None, :]) for values in (one, two))
    return _cosine(*(sign.reshape(*sign.shape[:-2], -1) for sign in signs))


def _cosine(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (one * two).sum(-1) / np.sqrt((one * one).sum(-1) * (two * two).sum(-1))
