"""Distances between sets of images: the Fréchet distance (FID where the features are Inception's) and KID."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


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


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """Fréchet distance of two Gaussians: |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al., 2017, eq. 6).

    The trace of the root is taken from the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), which are those of
    S1 S2; that stays exact where covariances are singular, and needs no root of a matrix that is not symmetric.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ two.covariance @ root)
    trace = np.trace(one.covariance) + np.trace(two.covariance) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return float(((one.mean - two.mean) ** 2).sum() + trace)


@dataclass(frozen=True)
class KernelDistance:
    """KID and how much it varies between sub-samples."""

    value: float
    spread: float


def kernel_distance(
    one: NDArray[np.floating],
    two: NDArray[np.floating],
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> KernelDistance:
    """KID: unbiased squared MMD of the kernel (x·y / D + 1)³, mean over sub-samples (Bińkowski et al., 2018, sec. 4).

    Args:
        one: features (n, D).
        two: features (m, D).
        subsets: number of sub-samples.
        subset_size: features drawn from each set without replacement; at most the smaller set.
        seed: of the draws.

    Returns:
        The mean, and the standard deviation over sub-samples.
    """
    size = min(subset_size, len(one), len(two))
    if size < 2:
        raise ValueError(f"KID needs at least 2 features on either side, not {len(one)} and {len(two)}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = np.asarray(one, dtype=np.float64)[rng.choice(len(one), size, replace=False)]
        y = np.asarray(two, dtype=np.float64)[rng.choice(len(two), size, replace=False)]
        values.append(squared_mmd(x, y))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def squared_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Unbiased squared maximum mean discrepancy of (n, D) and (n, D) under the cubic kernel."""
    n, width = x.shape
    xx, yy, xy = (((a @ b.T) / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())
