"""Confidence intervals that say over what they generalise."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

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


def bootstrap(
    scores: NDArray[np.floating],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = share_mean,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of sums over images (Efron & Tibshirani, 1993, ch. 13).

    Args:
        scores: (seeds, images), or (seeds, images, numbers): what every image adds to the sums. Seeds and images are
            resampled both, independently, so that the interval covers training noise too.
        statistic: sums (…, numbers), divided by the number of images → the statistic (…).
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The mean of the statistic over seeds, and its 95 % interval.

    Raises:
        ValueError: there is no score, or one is not finite.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"cannot bootstrap {table.size} scores, {int((~np.isfinite(table)).sum())} of them not finite")
    table = table[..., None] if table.ndim == 2 else table
    seeds, images, _ = table.shape
    image_share, seed_share = _shares(images, resamples, seed), _shares(seeds, resamples, seed + 1)
    drawn = np.stack([statistic(image_share @ one) for one in table], axis=1)  # (resamples, seeds)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile((drawn * seed_share).sum(axis=1), [tail, 100 - tail])
    return Interval(float(statistic(table.mean(axis=1)).mean()), float(low), float(high))
