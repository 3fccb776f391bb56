"""Confidence intervals that say over what they generalise."""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    value: float
    low: float
    high: float


@functools.lru_cache(maxsize=4)
def _shares(items: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How large a share of each resample every item has, (resamples, items).

    Kept between calls: every curve of a run is resampled over the same images, with the same draws.
    """
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples) / items


def bootstrap_mean(scores: NDArray[np.floating], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean (Efron & Tibshirani, 1993, ch. 13).

    Args:
        scores: (images,), or (seeds, images) with every seed scored on the same images; then seeds and images are
            resampled both, independently, so that the interval covers training noise too.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The mean and its 95 % interval.

    Raises:
        ValueError: there is no score, or one is not finite.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"cannot bootstrap {table.size} scores, {int((~np.isfinite(table)).sum())} of them not finite")
    seeds, images = table.shape
    image_share, seed_share = _shares(images, resamples, seed), _shares(seeds, resamples, seed + 1)
    means = ((image_share @ table.T) * seed_share).sum(axis=1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(table.mean()), float(low), float(high))
