"""How much the tokens of an image share one direction."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from analysis.alignment.metrics.base import LAYER, TOWER, LabelledBatch, Measure, ScoreRow, States


class Anisotropy(Measure):
    """Mean cosine of two tokens of an image."""

    sources = (LAYER, TOWER)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields one number per image."""
        yield ScoreRow(states.key("tokens", "anisotropy"), anisotropy(states.values), states.finite)


def anisotropy(tokens: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens (Ethayarajh, 2019, arXiv:1909.00512).

    From the sum s of the N unit vectors u: Σ_{i≠j} u_i·u_j = |s|² - Σ|u_i|², with N · d operations in place of N² · d.

    Args:
        tokens: (…, N, d), N at least 2.

    Returns:
        (…), float64, -1 / (N - 1) … 1; about 0 for independent random directions. A zero token has cosine 0.
    """
    count = tokens.shape[-2]
    unit = F.normalize(tokens.double(), dim=-1)
    return (unit.sum(dim=-2).square().sum(dim=-1) - unit.square().sum(dim=(-2, -1))) / (count * (count - 1))
