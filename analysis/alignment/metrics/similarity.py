"""Similarity of two representations of the same items: linear CKA and shared nearest neighbours."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.alignment.metrics.base import LabelledBatch, Measure, ScoreRow, States
from analysis.alignment.metrics.spectrum import centred
from probing.probes.ridge import resize_states
from probing.teachers.base import Teacher

CHUNK = 1024
"""Items whose neighbours are searched at once: memory grows with n, not n²."""


class PositionSimilarity(Measure):
    """Linear CKA of image tokens with a spatial teacher's target, over the positions of one image."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.grids = {name: teacher.grid for name, teacher in teachers.items() if teacher.grid}

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields one number per image and teacher."""
        for name, grid in self.grids.items():
            target = batch.targets[name]
            pairs = zip(resize_states(states.values, batch.tokens.grid, grid), target.values, strict=True)
            cka = torch.tensor([linear_cka(*pair) for pair in pairs])
            yield ScoreRow(states.key(name, "cka_places"), cka, states.finite & target.finite.to(states.finite.device))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of finite x (n, d1) and y (n, d2), n at least 4, with the unbiased estimator of HSIC.

    CKA is HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) of the Gram matrices K = X Xᵀ and L = Y Yᵀ (Kornblith et al., 2019,
    arXiv:1905.00414). The unbiased HSIC of Song et al. (2012, JMLR 13; used by arXiv:2405.07987) is the inner product
    of U-centred matrices over n (n - 3) (Székely & Rizzo, 2014, Annals of Statistics 42), so that CKA is a cosine.

    Returns:
        -1 … 1, about 0 for unrelated representations of any width; 0 if one is the same for all items.
    """
    return matrix_cosine(u_centred(gram(x)), u_centred(gram(y)))


def matrix_cosine(one: Tensor, two: Tensor) -> float:
    """Cosine of two matrices (n, n); 0 where one is zero."""
    length = torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(two)
    return float((one * two).sum() / length) if length > 0 else 0.0


def gram(features: Tensor) -> Tensor:
    """Inner products (n, n) of centred features (n, d), float64; a large mean would cost digits."""
    rows = centred(features)
    return rows @ rows.mT


def u_centred(matrix: Tensor) -> Tensor:
    """U-centres a Gram matrix (n, n) without its diagonal; exactly zero where only round-off is left."""
    matrix = matrix.clone().fill_diagonal_(0)
    count, sums = len(matrix), matrix.sum(dim=0)
    rest = matrix - (sums[:, None] + sums[None]) / (count - 2) + sums.sum() / ((count - 1) * (count - 2))
    rest.fill_diagonal_(0)
    round_off = count * torch.finfo(torch.float64).eps * torch.linalg.matrix_norm(matrix)
    return rest.masked_fill(torch.linalg.matrix_norm(rest) <= round_off, 0)


def nearest_neighbours(features: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the nearest other items of features (n, d), by cosine."""
    unit = F.normalize(features.double(), dim=-1)
    nearest = []
    for rows in torch.arange(len(unit), device=unit.device).split(CHUNK):
        cosine = (unit[rows] @ unit.T).scatter_(1, rows[:, None], -torch.inf)
        nearest.append(cosine.topk(k, dim=1).indices)
    return torch.cat(nearest)


def shared_neighbours(one: Tensor, other: Tensor) -> Tensor:
    """Fraction (n), float64, of the neighbours (n, k) of each item that are among its others (n, k)."""
    return (one[:, :, None] == other[:, None]).any(dim=2).double().mean(dim=1)
