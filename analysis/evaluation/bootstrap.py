"""Bootstrap confidence intervals over images, and over seeds × images."""

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
    """Returns the share of every item in each resample, (resamples, items).

    Cached, because every series of a run is resampled over the same images with the same draws.
    """
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples) / items


def share_mean(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the mean: the shares of a resample add up to one, so its total is its mean."""
    return totals[..., 0]


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Sums over images (…, numbers), divided by their number → the statistic (…)."""


def _checked(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns scores as (seeds, images, numbers); raises ValueError if there is none, or one is not finite."""
    table = np.asarray(scores, dtype=np.float64)
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"cannot bootstrap {table.size} scores, {int((~np.isfinite(table)).sum())} of them not finite")
    return table[..., None] if table.ndim == 2 else table


def _values(table: NDArray[np.float64], statistic: Statistic, resamples: int) -> NDArray[np.float64]:
    """Computes the statistic of every seed in every resample of the images, (resamples, seeds)."""
    share = _shares(table.shape[1], resamples, 0)
    return np.stack([statistic(share @ one) for one in table], axis=1)


def _mean_over_seeds(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Computes the mean over resampled seeds, (resamples).

    Resampling a few seeds spreads too little, by √((S - 1) / S), and has the tails of a normal distribution in place
    of Student's; deviations are widened by both, as Hesterberg (2015, arXiv:1411.5279) widens the percentiles of small
    samples. Two seeds say little, and their interval is wide.
    """
    resamples, seeds = values.shape
    centre = values.mean(axis=1)
    if seeds == 1:
        return centre
    share = _shares(seeds, resamples, seed)
    tails = (1 + LEVEL) / 2
    widened = math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(tails, seeds - 1) / stats.norm.ppf(tails)
    return centre + widened * ((values * share).sum(axis=1) - centre)


def _percentiles(drawn: NDArray[np.float64], images: int) -> tuple[float, float]:
    if images < 2 or np.isnan(drawn).all():  # every resample of one image is that image
        return math.nan, math.nan
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap(scores: NDArray[np.floating], statistic: Statistic = share_mean, resamples: int = RESAMPLES) -> Interval:
    """Bootstraps a statistic of sums over images by percentiles (Efron & Tibshirani, 1993, ch. 13).

    Args:
        scores: (seeds, images), or (seeds, images, numbers): every image's terms of the sums. Seeds and images are
            resampled independently, so that the interval covers training noise too; see `_mean_over_seeds`.
        statistic: of the sums.
        resamples: number of bootstrap samples.

    Returns:
        The mean of the statistic over seeds, and its 95 % interval; NaN for a single image.

    Raises:
        ValueError: there is no score, or one is not finite.
    """
    table = _checked(scores)
    drawn = _mean_over_seeds(_values(table, statistic, resamples), 1)
    return Interval(float(statistic(table.mean(axis=1)).mean()), *_percentiles(drawn, table.shape[1]))


def paired_bootstrap(
    scores: NDArray[np.floating],
    reference: NDArray[np.floating],
    statistic: Statistic = share_mean,
    seeds_paired: bool = False,
) -> Interval:
    """Bootstraps the difference of two statistics over the same resampled images.

    Args:
        scores: as for `bootstrap`.
        reference: of the same images in the same order.
        statistic: of the sums of each.
        seeds_paired: seed k of one shares something with seed k of the other (for example the language model that two
            checkpoints start from), and they are resampled together; otherwise independently.

    Returns:
        Scores minus reference, and the 95 % interval of that; NaN for a single image.

    Raises:
        ValueError: the numbers of images or of paired seeds differ, there is no score, or one is not finite.
    """
    one, two = _checked(scores), _checked(reference)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"{one.shape[1]} images cannot be paired with {two.shape[1]}")
    if seeds_paired and len(one) != len(two):
        raise ValueError(f"{len(one)} seeds cannot be paired with {len(two)}")
    values = [_values(table, statistic, RESAMPLES) for table in (one, two)]
    if seeds_paired:
        drawn = _mean_over_seeds(values[0] - values[1], 1)
    else:
        drawn = _mean_over_seeds(values[0], 1) - _mean_over_seeds(values[1], 2)
    value = float(statistic(one.mean(axis=1)).mean() - statistic(two.mean(axis=1)).mean())
    return Interval(value, *_percentiles(drawn, one.shape[1]))
