"""How sets of vectors lie: likeness of two representations, anisotropy of tokens, and where attention goes."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024
"""Items whose neighbours are looked for at once, so that memory grows with n and not with n²."""


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (…, d) of length one, float64; a row that is zero stays zero."""
    rows = rows.double()
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)


def centred(rows: Tensor) -> Tensor:
    """Rows (…, N, d) less their mean over N, float64.

    Rows that are all the same differ from their mean by round-off. That would look like a direction once it is scaled
    up, so what is no longer than round-off becomes exactly zero.
    """
    rows = rows.double()
    longest = torch.linalg.vector_norm(rows, dim=-1).amax(dim=-1)[..., None, None]
    rest = rows - rows.mean(dim=-2, keepdim=True)
    small = torch.linalg.vector_norm(rest, dim=-1, keepdim=True) <= _round_off(rows.shape[-2]) * longest
    return rest.masked_fill(small, 0)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two representations of the same items, with the unbiased estimator of HSIC.

    CKA is HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) of the Gram matrices K = X Xᵀ and L = Y Yᵀ (Kornblith et al., 2019,
    arXiv:1905.00414); each HSIC is the unbiased one of Song et al. (2012, JMLR 13), which Huh et al. (2024,
    arXiv:2405.07987) use too. That estimator is the inner product of the two matrices after their diagonal
    is left out and rows and columns are U-centred, over n (n - 3) (Székely & Rizzo, 2014, Annals of Statistics 42),
    so that CKA is a cosine.

    At chance, with representations that have nothing to do with each other, its expectation is about 0 whatever the
    widths, and single values may be negative; the biased estimator grows with width / n there.

    Args:
        x: (n, d1).
        y: (n, d2), of the same items in the same order.

    Returns:
        -1 … 1; 0 where a representation tells no items apart, or only one from all the others.

    Raises:
        ValueError: shapes do not fit, there are fewer than four items, or a value is not finite.
    """
    _check_pair(x, y, least=4)
    return matrix_cosine(u_centred(gram(x)), u_centred(gram(y)))


def matrix_cosine(one: Tensor, two: Tensor) -> float:
    """Cosine of two matrices (n, n); 0 where one is zero. Of U-centred Gram matrices it is `linear_cka`."""
    length = torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(two)
    return float((one * two).sum() / length) if length > 0 else 0.0


def gram(features: Tensor) -> Tensor:
    """Inner products (n, n) of features (n, d) less their mean, float64; large means would cost digits."""
    rows = centred(features)
    return rows @ rows.mT


def u_centred(matrix: Tensor) -> Tensor:
    """A Gram matrix (n, n) without its diagonal, U-centred; exactly zero where only round-off is left."""
    matrix = matrix.clone().fill_diagonal_(0)
    count, sums = len(matrix), matrix.sum(dim=0)
    rest = matrix - (sums[:, None] + sums[None]) / (count - 2) + sums.sum() / ((count - 1) * (count - 2))
    rest.fill_diagonal_(0)
    small = torch.linalg.matrix_norm(rest) <= _round_off(count) * torch.linalg.matrix_norm(matrix)
    return rest.masked_fill(small, 0)


def neighbour_overlap(one: Tensor, other: Tensor, k: int) -> Tensor:
    """Share of its k nearest neighbours that an item keeps from one representation to another.

    Neighbours are by cosine, the item itself left out. The mean over items is the mutual k-NN alignment of Huh et al.
    (2024, arXiv:2405.07987), and, with one representation before a projector and the other after it (each
    picture the mean of its tokens), the neighbour overlap of "Lost in Embeddings" (2025, arXiv:2509.11986). The latter
    ranks by Euclidean distance: that is the same on rows of length one, not on others.

    Args:
        one: (n, d1).
        other: (n, d2), of the same items in the same order.
        k: number of neighbours, 1 … n - 1.

    Returns:
        (n), float64, one share per item, so that an interval over items can be drawn. At chance:
        `overlap_at_chance`. Among equally near items the choice is arbitrary.

    Raises:
        ValueError: shapes do not fit, k is out of range, or a value is not finite.
    """
    _check_pair(one, other, least=2)
    return shared_neighbours(nearest_neighbours(one, k), nearest_neighbours(other, k).to(one.device))


def nearest_neighbours(features: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the nearest other items of features (n, d), by cosine.

    Raises:
        ValueError: k is out of range.
    """
    overlap_at_chance(len(features), k)
    unit = unit_rows(features)
    groups = torch.split(torch.arange(len(unit), device=unit.device), ROWS_AT_ONCE)
    return torch.cat([_nearest(unit, rows, k) for rows in groups])


def shared_neighbours(one: Tensor, other: Tensor) -> Tensor:
    """Share (n), float64, of the neighbours (n, k) of each item that are among its others (n, k)."""
    return (one[:, :, None] == other[:, None]).any(dim=2).double().mean(dim=1)


def overlap_at_chance(n: int, k: int) -> float:
    """Expectation of `neighbour_overlap` for representations without relation: k / (n - 1).

    Each of the k neighbours is then any of the other n - 1 items with the same probability.

    Raises:
        ValueError: k is not in 1 … n - 1.
    """
    if not 1 <= k < n:
        raise ValueError(f"an item among {n} has at most {n - 1} neighbours and needs at least 1, not {k}")
    return k / (n - 1)


def anisotropy(tokens: Tensor) -> Tensor:
    """Mean cosine of two different tokens (Ethayarajh, 2019, arXiv:1909.00512), over all pairs.

    From the sum s of the N unit vectors u: Σ_{i≠j} u_i·u_j = |s|² - Σ|u_i|², which needs N · d operations and not
    N² · d. Tokens of independent random directions have expectation 0, tokens of one direction 1, and no N tokens less
    than -1 / (N - 1).

    Args:
        tokens: (…, N, d).

    Returns:
        (…), float64; a zero token has cosine 0 with every other.

    Raises:
        ValueError: there are fewer than two tokens, or a value is not finite.
    """
    if tokens.ndim < 2 or tokens.shape[-2] < 2 or not tokens.isfinite().all():
        raise ValueError(f"anisotropy takes finite tokens (…, N, d), N at least 2, not {tuple(tokens.shape)}")
    count = tokens.shape[-2]
    unit = unit_rows(tokens)
    return (unit.sum(dim=-2).square().sum(dim=-1) - unit.square().sum(dim=(-2, -1))) / (count * (count - 1))


def _round_off(count: int) -> float:
    """How far a sum of so many float64 numbers may be off, relative to the largest."""
    return count * torch.finfo(torch.float64).eps


def _check_pair(one: Tensor, other: Tensor, least: int) -> None:
    """Raises ValueError unless both are finite representations (n, d) of the same number of items."""
    if one.ndim != 2 or other.ndim != 2 or len(one) != len(other) or len(one) < least:
        raise ValueError(
            f"two representations of at least {least} same items are (n, d1) and (n, d2), "
            f"not {tuple(one.shape)} and {tuple(other.shape)}"
        )
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError("a representation is not finite")


def _nearest(unit: Tensor, rows: Tensor, k: int) -> Tensor:
    """Indices (rows, k) of the nearest neighbours of some rows of unit vectors (n, d)."""
    cosine = unit[rows] @ unit.T
    cosine.scatter_(1, rows[:, None], -torch.inf)
    return cosine.topk(k, dim=1).indices
