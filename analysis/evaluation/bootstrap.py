"""Confidence intervals that say over what they generalise."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


@functools.lru_cache(maxsize=4)
def _shares(items: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How large a share of each resample every item has, (resamples, items).

    Kept between calls: every curve of a run is resampled over the same images, with the same draws.
    """
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples) / items


def share_mean(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The statistic of a plain mean: the shares of a resample add up to one, so its total is its mean."""
    return totals[..., 0]


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Sums over images (…, numbers), divided by their number → the statistic (…)."""


def _checked(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scores as (seeds, images, numbers); raises ValueError where there is none, or one is not finite."""
    table = np.asarray(scores, dtype=np.float64)
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"cannot bootstrap {table.size} scores, {int((~np.isfinite(table)).sum())} of them not finite")
    return table[..., None] if table.ndim == 2 else table


def _values(table: NDArray[np.float64], statistic: Statistic, resamples: int, seed: int) -> NDArray[np.float64]:
    """The statistic of every seed in every resample of the images, (resamples, seeds)."""
    share = _shares(table.shape[1], resamples, seed)
    return np.stack([statistic(share @ one) for one in table], axis=1)


def _mean_over_seeds(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """The mean over resampled seeds, (resamples).

    Resampling a handful of seeds spreads too little, by √((S - 1) / S), and has the tails of a normal distribution
    where Student's are due; deviations are widened by both, as Hesterberg (2015, arXiv:1411.5279) widens the
    percentiles of small samples. Of two seeds little can be said, and the interval is wide.
    """
    resamples, seeds = values.shape
    centre = values.mean(axis=1)
    if seeds == 1:
        return centre
    share = _shares(seeds, resamples, seed)
    tails = (1 + LEVEL) / 2
    widened = math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(tails, seeds - 1) / stats.norm.ppf(tails)
    return centre + widened * ((values * share).sum(axis=1) - centre)


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    if np.isnan(drawn).all():
        return math.nan, math.nan
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap(
    scores: NDArray[np.floating], statistic: Statistic = share_mean, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a statistic of sums over images (Efron & Tibshirani, 1993, ch. 13).

    Args:
        scores: (seeds, images), or (seeds, images, numbers): what every image adds to the sums. Seeds and images are
            resampled both, independently, so that the interval covers training noise too; see `_mean_over_seeds`.
        statistic: of the sums.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The mean of the statistic over seeds, and its 95 % interval.

    Raises:
        ValueError: there is no score, or one is not finite.
    """
    table = _checked(scores)
    interval = _percentiles(_mean_over_seeds(_values(table, statistic, resamples, seed), seed + 1))
    return Interval(float(statistic(table.mean(axis=1)).mean()), *interval)


def paired_bootstrap(
    scores: NDArray[np.floating],
    reference: NDArray[np.floating],
    statistic: Statistic = share_mean,
    seeds_paired: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The same for the difference of two statistics of the same images: both see the same resampled images.

    Args:
        scores: as for `bootstrap`.
        reference: of the same images in the same order.
        statistic: of the sums of each.
        seeds_paired: seed k of the one shares something with seed k of the other (the language model that two
            checkpoints start from, say), and they are resampled together; otherwise each on its own.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        Scores minus reference, and the 95 % interval of that.

    Raises:
        ValueError: the images, or seeds that are pairs, differ in number, there is no score, or one is not finite.
    """
    one, two = _checked(scores), _checked(reference)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"{one.shape[1]} images cannot be paired with {two.shape[1]}")
    if seeds_paired and len(one) != len(two):
        raise ValueError(f"{len(one)} seeds cannot be paired with {len(two)}")
    values = [_values(table, statistic, resamples, seed) for table in (one, two)]
    if seeds_paired:
        drawn = _mean_over_seeds(values[0] - values[1], seed + 1)
    else:
        drawn = _mean_over_seeds(values[0], seed + 1) - _mean_over_seeds(values[1], seed + 2)
    value = float(statistic(one.mean(axis=1)).mean() - statistic(two.mean(axis=1)).mean())
    return Interval(value, *_percentiles(drawn))
