"""How far a set of tokens is compressed: entropies of its spectrum, and the ranks that they stand for.

The variants differ in what they do to the tokens first, and give different numbers for the same tokens:

| function | centred | rows of length one | spectrum |
|---|---|---|---|
| `von_neumann_entropy` | no | yes | eigenvalues of the second moment |
| `effective_rank` | yes | yes | the same |
| `effective_rank_singular` | no | no | singular values, not squared |
| `matrix_entropy` | no | no | eigenvalues of the Gram matrix |

All take tokens (…, N, d) and return (…), float64. None exceeds `entropy_bound` (ranks: its exponential), which depends
on N and d: numbers of different widths are compared by their distance from it. All are blind to rotation and to the
scale of all tokens together. Random directions are not far below the bound: with m the smaller and M the larger of N
and d, their `von_neumann_entropy` is about ln m - m / 2M (Page, 1993, arXiv:gr-qc/9305007).
"""

import math

import torch
from torch import Tensor

from analysis.alignment.metrics.similarity import centred, unit_rows


def entropy_bound(count: int, width: int, is_centred: bool = False) -> float:
    """The most that an entropy of N tokens of width d can be: ln min(N, d), in nats.

    Args:
        count: N, tokens of one set.
        width: d.
        is_centred: their mean is taken away first, as for `effective_rank`, which costs one dimension:
            ln min(N - 1, d).

    Raises:
        ValueError: no dimension is left.
    """
    rank = min(count - 1 if is_centred else count, width)
    if rank < 1:
        raise ValueError(f"{count} tokens of width {width} span no dimension")
    return math.log(rank)


def von_neumann_entropy(tokens: Tensor) -> Tensor:
    """Entropy -Σ λ ln λ of ρ = ZᵀZ / N, with rows of Z of length one and not centred (Kim et al., CVPR 2023, VNE).

    arXiv:2304.01434, natural logarithm.

    Args:
        tokens: (…, N, d).

    Returns:
        (…), nats, 0 … ln min(N, d); 0 where all tokens have one direction. A zero token has no direction and does not
        count.

    Raises:
        ValueError: tokens are not of this shape, or not finite.
    """
    _check(tokens)
    return _shannon(_distribution(_eigenvalues(unit_rows(tokens))))


def effective_rank(tokens: Tensor) -> Tensor:
    """Exponential of that entropy after the mean token is taken away (Wei et al., NeurIPS 2024, eRank).

    arXiv:2401.17139: tokens less their mean, rows of length one, covariance, entropy, exponential, in this order.

    Args:
        tokens: (…, N, d).

    Returns:
        (…), 1 … min(N - 1, d), or 0 where all tokens are the same. A token that equals the mean does not count.

    Raises:
        ValueError: tokens are not of this shape, there are fewer than two, or they are not finite.
    """
    _check(tokens, least=2)
    return _rank(_eigenvalues(unit_rows(centred(tokens))))


def effective_rank_singular(tokens: Tensor) -> Tensor:
    """Exponential of the entropy of singular values over their sum (Roy & Vetterli, 2007, EUSIPCO).

    Neither centred nor of rows of length one. Singular values enter as they are: their squares, the eigenvalues of the
    other variants, give a smaller number.

    Args:
        tokens: (…, N, d).

    Returns:
        (…), 1 … min(N, d), or 0 where all tokens are zero.

    Raises:
        ValueError: tokens are not of this shape, or not finite.
    """
    _check(tokens)
    # Roots of eigenvalues rather than an SVD, which takes ten times as long; what is lost is below 1e-7 of the largest.
    return _rank(_distribution(_eigenvalues(tokens.double())).sqrt())


def matrix_entropy(tokens: Tensor, alpha: float) -> Tensor:
    """Rényi's entropy ln Σ p^α / (1 - α), with p the eigenvalues of the Gram matrix ZZᵀ over its trace.

    Skean et al. (2025, arXiv:2502.02013), without one of their normalisers: divide by `entropy_bound` for a
    share. Tokens are taken as they are, so that long ones weigh more; of tokens of equal length, α = 1 is
    `von_neumann_entropy`. Negative entries of the Gram matrix stay, which their code sets to zero.

    Args:
        tokens: (…, N, d).
        alpha: order, above 0; 1 is the limit, von Neumann's entropy. The larger, the less small eigenvalues count.

    Returns:
        (…), nats, 0 … ln min(N, d).

    Raises:
        ValueError: tokens are not of this shape, or not finite, or the order is not above 0 and finite.
    """
    _check(tokens)
    if not 0 < alpha < math.inf:
        raise ValueError(f"the order of an entropy is above 0 and finite, not {alpha}")
    if alpha == 2:  # Σ p² is a sum over the Gram matrix, which needs no eigenvalues
        return _order_two(tokens.double())
    shares = _distribution(_eigenvalues(tokens.double()))
    if math.isclose(alpha, 1):
        return _shannon(shares)
    entropy = torch.logsumexp(alpha * shares.log(), dim=-1) / (1 - alpha)
    return torch.where(shares.any(dim=-1), entropy, 0)


def _check(tokens: Tensor, least: int = 1) -> None:
    if tokens.ndim < 2 or tokens.shape[-2] < least or tokens.shape[-1] < 1 or not tokens.isfinite().all():
        raise ValueError(f"expected finite tokens (…, N, d), N at least {least}, not {tuple(tokens.shape)}")


def _smaller(rows: Tensor) -> Tensor:
    """The smaller of RᵀR and RRᵀ, which share their eigenvalues but for zeros."""
    count, width = rows.shape[-2:]
    return rows @ rows.mT if count <= width else rows.mT @ rows


def _eigenvalues(rows: Tensor) -> Tensor:
    """Eigenvalues (…, min(N, d)) of RᵀR, without further zeros."""
    values: Tensor = torch.linalg.eigvalsh(_smaller(rows))
    return values


def _order_two(tokens: Tensor) -> Tensor:
    """-ln Σ p², p the eigenvalues of the Gram matrix over its trace; 0 where all tokens are zero."""
    matrix = _smaller(tokens)
    squares = matrix.square().sum(dim=(-2, -1))
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return torch.where(squares > 0, 2 * trace.log() - squares.log(), 0).clamp(min=0)


def _distribution(spectrum: Tensor) -> Tensor:
    """A spectrum over its sum; what is within round-off of zero, on either side, becomes zero."""
    largest = spectrum.amax(dim=-1, keepdim=True)
    floor = spectrum.shape[-1] * torch.finfo(spectrum.dtype).eps * largest
    kept = torch.where(spectrum > floor, spectrum, 0)
    total = kept.sum(dim=-1, keepdim=True)
    return kept / torch.where(total > 0, total, 1)


def _shannon(shares: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(shares)
    return terms.sum(dim=-1)


def _rank(spectrum: Tensor) -> Tensor:
    """Exponential of the entropy of a spectrum (…, m); 0 where it is zero, as the rank of a zero matrix is."""
    shares = _distribution(spectrum)
    return torch.where(shares.any(dim=-1), _shannon(shares).exp(), 0)
