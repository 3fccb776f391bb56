"""Relative depth: which of two points is closer, as DA-2K asks (Depth Anything V2, arXiv:2406.09414, sec. 6)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probing.data.da2k import Pair


def score_pairs(depth: NDArray[np.floating], pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Scores one map.

    Args:
        depth: (rows, columns) at the image's own size; larger is closer.
        pairs: of that image.

    Returns:
        Per pair: 1 where the closer point has the larger value, 0.5 where both are equal, else 0. A constant map
        therefore scores one half.
    """
    near = np.array([depth[pair.closer] for pair in pairs])
    far = np.array([depth[pair.farther] for pair in pairs])
    return np.where(near > far, 1.0, np.where(near == far, 0.5, 0.0))


def row_score(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """What the image row alone scores: the point further down is taken for the closer one."""
    return np.array([0.5 + 0.5 * np.sign(pair.closer[0] - pair.farther[0]) for pair in pairs])


def pair_accuracy(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of pairs that are right, from sums (…, 2) of scores and of numbers of pairs."""
    return totals[..., 0] / totals[..., 1]
