"""Compression of a set of tokens: entropies and effective ranks of its spectrum.

The variants preprocess the tokens differently, and give different numbers for the same tokens:

| function | centred | rows of length one | spectrum |
|---|---|---|---|
| `von_neumann_entropy` | no | yes | eigenvalues of the second moment |
| `effective_rank` | yes | yes | the same |
| `effective_rank_singular` | no | no | singular values, not squared |
| `matrix_entropy` | no | no | eigenvalues of the Gram matrix |

All take finite tokens (…, N, d) and return (…), float64. Entropies are in nats, at most ln min(N, d), or
ln min(N - 1, d) after centring; ranks are at most the exponential of it. All are invariant to rotation and to a common
scale. Random directions are not far below the bound: with m the smaller and M the larger of N and d, their
`von_neumann_entropy` is about ln m - m / 2M (Page, 1993, arXiv:gr-qc/9305007).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.alignment.metrics.base import LAYER, TOWER, LabelledBatch, Measure, ScoreRow, States


class Compression(Measure):
    """How few directions the tokens of an image use, before the projector and at every layer."""

    sources = (LAYER, TOWER)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields one number per image and measure."""
        for metric, variant, function in (
            ("von_neumann_entropy", "uncentred", von_neumann_entropy),
            ("matrix_entropy", "uncentred", matrix_entropy),
            ("effective_rank", "centred", effective_rank),
            ("effective_rank_singular", "uncentred", effective_rank_singular),
        ):
            yield ScoreRow(states.key("tokens", metric, variant), function(states.values), states.finite)


def von_neumann_entropy(tokens: Tensor) -> Tensor:
    """Entropy -Σ λ ln λ of ρ = ZᵀZ / N, Z the tokens at length one (Kim et al., CVPR 2023, arXiv:2304.01434).

    0 where all tokens have one direction. Zero tokens do not count.
    """
    return _shannon(_distribution(_eigenvalues(F.normalize(tokens.double(), dim=-1))))


def effective_rank(tokens: Tensor) -> Tensor:
    """Exponential of `von_neumann_entropy` of centred tokens, N at least 2 (Wei et al., 2024, arXiv:2401.17139).

    0 where all tokens are equal. Tokens equal to the mean do not count.
    """
    return _rank(_eigenvalues(F.normalize(centred(tokens), dim=-1)))


def effective_rank_singular(tokens: Tensor) -> Tensor:
    """Exponential of the entropy of singular values over their sum (Roy & Vetterli, 2007, EUSIPCO).

    Singular values enter unsquared: their squares, as in the other variants, give a smaller number.
    """
    # Roots of eigenvalues: an SVD takes ten times as long, and the error is below 1e-7 of the largest singular value.
    return _rank(_distribution(_eigenvalues(tokens.double())).sqrt())


def matrix_entropy(tokens: Tensor) -> Tensor:
    """Rényi's entropy of order 2, -ln Σ p², p the eigenvalues of ZZᵀ over its trace (arXiv:2502.02013).

    Not divided by its bound, and without their clamping of negative entries. 0 where all tokens are zero.
    """
    gram = _smaller_gram(tokens.double())
    squares = gram.square().sum(dim=(-2, -1))
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return torch.where(squares > 0, 2 * trace.log() - squares.log(), 0).clamp(min=0)


def centred(rows: Tensor) -> Tensor:
    """Subtracts the mean over N from rows (…, N, d), float64; differences within round-off become exactly zero."""
    rows = rows.double()
    longest = torch.linalg.vector_norm(rows, dim=-1).amax(dim=-1)[..., None, None]
    rest = rows - rows.mean(dim=-2, keepdim=True)
    round_off = rows.shape[-2] * torch.finfo(torch.float64).eps * longest
    return rest.masked_fill(torch.linalg.vector_norm(rest, dim=-1, keepdim=True) <= round_off, 0)


def _smaller_gram(rows: Tensor) -> Tensor:
    """The smaller of RᵀR and RRᵀ, which share their nonzero eigenvalues."""
    count, width = rows.shape[-2:]
    return rows @ rows.mT if count <= width else rows.mT @ rows


def _eigenvalues(rows: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(_smaller_gram(rows))


def _distribution(spectrum: Tensor) -> Tensor:
    """Divides a spectrum by its sum; entries within round-off of zero become zero."""
    floor = spectrum.shape[-1] * torch.finfo(spectrum.dtype).eps * spectrum.amax(dim=-1, keepdim=True)
    spectrum = torch.where(spectrum > floor, spectrum, 0)
    total = spectrum.sum(dim=-1, keepdim=True)
    return spectrum / torch.where(total > 0, total, 1)


def _shannon(shares: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(shares)
    return terms.sum(dim=-1)


def _rank(spectrum: Tensor) -> Tensor:
    """Exponential of the entropy of a spectrum (…, m); 0 where it is zero."""
    shares = _distribution(spectrum)
    return torch.where(shares.any(dim=-1), _shannon(shares).exp(), 0)
