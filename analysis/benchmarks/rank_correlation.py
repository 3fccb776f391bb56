"""Whether two numbers of some checkpoints have the same order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.evaluation.bootstrap import LEVEL, RESAMPLES, Interval

LEAST, FEW = 3, 8
"""Below the first no correlation is given, below the second a warning with it: of four checkpoints in random order one
in 24 has every pair in order."""


@dataclass(frozen=True)
class RankCorrelation:
    """Rank correlations over checkpoints.

    Attributes:
        rho: Spearman's.
        tau: Kendall's τ-b.
        count: of checkpoints.
    """

    rho: Interval
    tau: Interval
    count: int


def rank_correlation(
    one: NDArray[np.floating], two: NDArray[np.floating], resamples: int = RESAMPLES, seed: int = 0
) -> RankCorrelation:
    """Spearman's ρ and Kendall's τ-b with percentile intervals over resampled checkpoints.

    Resamples in which one of the numbers is the same throughout have no correlation, and are left out. The numbers' own
    errors are not in the intervals.

    Args:
        one: (checkpoints).
        two: (checkpoints), of the same ones.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: there are fewer than `LEAST` checkpoints, one of the numbers is not finite, or all are the same.
    """
    table = np.asarray([one, two], dtype=np.float64)
    count = table.shape[1]
    if count < LEAST:
        raise ValueError(f"{count} checkpoints have no rank correlation; give at least {LEAST}")
    if not np.isfinite(table).all() or any(len(set(row)) < 2 for row in table.tolist()):
        raise ValueError("no rank correlation where a number is not finite, or the same for every checkpoint")
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    (x, y), (xs, ys) = table[:, None], table[:, drawn]
    rho, tau = (_interval(measure(x, y)[0], measure(xs, ys)) for measure in (spearman, kendall))
    return RankCorrelation(rho, tau, count)


def _interval(value: np.float64, drawn: NDArray[np.float64]) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))


def spearman(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's ρ (Spearman, 1904) of rows: (…, n) → (…); not a number where a row is constant."""
    ranks = [stats.rankdata(values, axis=-1) for values in (one, two)]
    a, b = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    return _over((a * b).sum(-1), (a * a).sum(-1) * (b * b).sum(-1))


def kendall(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kendall's τ-b (Kendall, 1945) of rows: (…, n) → (…); not a number where a row is constant."""
    a, b = (np.sign(values[..., :, None] - values[..., None, :]) for values in (one, two))
    return _over((a * b).sum((-2, -1)), (a * a).sum((-2, -1)) * (b * b).sum((-2, -1)))


def _over(product: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return product / np.sqrt(squares)
