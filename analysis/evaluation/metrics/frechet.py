"""Distances between sets of images: the Fréchet distance (FID where the features are Inception's) and KID."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.evaluation.bootstrap import Interval

ENOUGH_IMAGES = 2048
"""With fewer images than Inception has features, covariances are singular and the distance is biased upwards."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def is_distance(metric: str) -> bool:
    """Whether a metric is a distance between sets of images, so that less is better."""
    return metric in ("fid", "kid") or metric.startswith(("frechet_", "kernel_"))


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (D).
        covariance: (D, D), divided by n - 1.
        n: number of features.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    n: int

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "Gaussian":
        """Fits features (n, D).

        Raises:
            ValueError: fewer than two features, or one that is not finite.
        """
        table = np.asarray(features, dtype=np.float64)
        if table.ndim != 2 or len(table) < 2 or not np.isfinite(table).all():
            raise ValueError(f"cannot fit a Gaussian to features of shape {table.shape}")
        return cls(table.mean(axis=0), np.atleast_2d(np.cov(table, rowvar=False)), len(table))

    @functools.cached_property
    def root(self) -> NDArray[np.float64]:
        """The symmetric root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """Fréchet distance of two Gaussians: |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al., 2017, eq. 6).

    The trace of the root is taken from the eigenvalues of the symmetric S2^(1/2) S1 S2^(1/2), which are those of
    S1 S2; that stays exact where covariances are singular, and needs no root of a matrix that is not symmetric. The
    root of `two`, the reference, is computed once.
    """
    cross = np.linalg.eigvalsh(two.root @ one.covariance @ two.root)
    trace = np.trace(one.covariance) + np.trace(two.covariance) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return float(((one.mean - two.mean) ** 2).sum() + trace)


def kernel_distances(
    one: NDArray[np.floating],
    two: NDArray[np.floating],
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> NDArray[np.float64]:
    """KID of sub-samples: unbiased squared MMD of the kernel (x·y / D + 1)³ (Bińkowski et al., 2018, sec. 4).

    Args:
        one: features (n, D).
        two: features (m, D).
        subsets: number of sub-samples.
        subset_size: features drawn from each set without replacement; at most half of the smaller set, lest all
            sub-samples be the same.
        seed: of the draws.

    Returns:
        (subsets); their mean is the KID.
    """
    size = min(subset_size, len(one) // 2, len(two) // 2)
    if size < 2:
        raise ValueError(f"KID needs at least 4 features on either side, not {len(one)} and {len(two)}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = np.asarray(one, dtype=np.float64)[rng.choice(len(one), size, replace=False)]
        y = np.asarray(two, dtype=np.float64)[rng.choice(len(two), size, replace=False)]
        values.append(squared_mmd(x, y))
    return np.array(values)


def sample_spread(values: NDArray[np.float64]) -> Interval:
    """Mean of sub-samples, and the range that holds 95 % of them: their spread, not an interval of the mean."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))


def squared_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Unbiased squared maximum mean discrepancy of (n, D) and (n, D) under the cubic kernel."""
    n, width = x.shape
    xx, yy, xy = (((a @ b.T) / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


@dataclass(frozen=True)
class Jackknife:
    """Distances of all images, and with a group of them left out in turn.

    Attributes:
        whole: (seeds).
        left_out: (groups, seeds).
    """

    whole: NDArray[np.float64]
    left_out: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating], reference: Gaussian, groups: int = 10) -> "Jackknife":
        """Fréchet distances of features (seeds, n, D) from a reference; fewer groups where there are few images."""
        n = features.shape[1]
        groups = min(groups, n // 2)
        place = np.arange(n) % groups

        def distances(kept: NDArray[np.bool_]) -> list[float]:
            return [frechet_distance(Gaussian.of(one[kept]), reference) for one in features]

        left_out = [distances(place != group) for group in range(groups)]
        return cls(np.array(distances(place >= 0)), np.array(left_out))

    @classmethod
    def mean(cls, several: Sequence["Jackknife"]) -> "Jackknife":
        """Of the mean of several distances, over layers say, of the same images."""
        return cls(np.mean([one.whole for one in several], axis=0), np.mean([one.left_out for one in several], axis=0))

    @classmethod
    def of_seeds(cls, several: Sequence["Jackknife"]) -> "Jackknife":
        """Those of several seeds of the same images side by side."""
        whole = np.concatenate([one.whole for one in several])
        return cls(whole, np.concatenate([one.left_out for one in several], axis=1))

    def interval(self) -> Interval:
        """Mean over seeds, with a 95 % interval over images and seeds, centred on it.

        A bootstrap would not do: repeated images narrow a covariance and push the distance up. The spread of the
        distances without one group is scaled up instead (delete-a-group jackknife; Kott, 2001); training noise adds its
        own variance where there are several seeds.
        """
        return _interval(self.whole.mean(), self.left_out.mean(axis=1), [self.whole])

    def interval_above(self, other: "Jackknife", seeds_paired: bool = False) -> Interval:
        """The same for the difference from other distances, of the same images in the same groups.

        Args:
            other: what is taken away.
            seeds_paired: seed k of the one belongs to seed k of the other; otherwise each varies on its own.
        """
        left_out = self.left_out.mean(axis=1) - other.left_out.mean(axis=1)
        seeds = [self.whole - other.whole] if seeds_paired else [self.whole, other.whole]
        return _interval(self.whole.mean() - other.whole.mean(), left_out, seeds)


def _interval(value: float, left_out: NDArray[np.float64], seeds: Sequence[NDArray[np.float64]]) -> Interval:
    """Interval of a value from its spread over groups left out, and over the seeds of what it is a sum of."""
    groups = len(left_out)
    variance, freedom = (groups - 1) ** 2 / groups * np.var(left_out, ddof=1), groups - 1
    for values in (values for values in seeds if len(values) > 1):
        variance += np.var(values, ddof=1) / len(values)
        freedom = min(freedom, len(values) - 1)
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Interval(float(value), float(value) - reach, float(value) + reach)
