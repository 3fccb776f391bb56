"""Confidence intervals that say over what they generalise."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def _drawn(table: NDArray[np.float64], statistic: Statistic, resamples: int, seed: int, apart: int) -> Any:
    """The mean over seeds in every resample (resamples); `apart` tells the draws of seeds of two tables apart."""
    seeds, images, _ = table.shape
    image_share, seed_share = _shares(images, resamples, seed), _shares(seeds, resamples, seed + 1 + apart)
    values = np.stack([statistic(image_share @ one) for one in table], axis=1)
    return (values * seed_share).sum(axis=1)


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap(
    scores: NDArray[np.floating], statistic: Statistic = share_mean, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a statistic of sums over images (Efron & Tibshirani, 1993, ch. 13).

    Args:
        scores: (seeds, images), or (seeds, images, numbers): what every image adds to the sums. Seeds and images are
            resampled both, independently, so that the interval covers training noise too.
        statistic: of the sums.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The mean of the statistic over seeds, and its 95 % interval.

    Raises:
        ValueError: there is no score, or one is not finite.
    """
    table = _checked(scores)
    interval = _percentiles(_drawn(table, statistic, resamples, seed, 0))
    return Interval(float(statistic(table.mean(axis=1)).mean()), *interval)


def paired_bootstrap(
    scores: NDArray[np.floating],
    reference: NDArray[np.floating],
    statistic: Statistic = share_mean,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The same for the difference of two statistics of the same images: both see the same resampled images.

    Args:
        scores: as for `bootstrap`.
        reference: of the same images in the same order; its seeds are resampled on their own, for seed k of one
            training has nothing to do with seed k of another.
        statistic: of the sums of each.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        Scores minus reference, and the 95 % interval of that.

    Raises:
        ValueError: the images differ in number, there is no score, or one is not finite.
    """
    one, two = _checked(scores), _checked(reference)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"{one.shape[1]} images cannot be paired with {two.shape[1]}")
    drawn = _drawn(one, statistic, resamples, seed, 0) - _drawn(two, statistic, resamples, seed, 1)
    value = float(statistic(one.mean(axis=1)).mean() - statistic(two.mean(axis=1)).mean())
    return Interval(value, *_percentiles(drawn))
