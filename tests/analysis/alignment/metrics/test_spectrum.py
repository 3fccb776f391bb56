"""Entropies and ranks of tokens whose spectrum is known."""

import math

import numpy as np
import pytest
import torch

from analysis.alignment.metrics.spectrum import (
    effective_rank,
    effective_rank_singular,
    matrix_entropy,
    von_neumann_entropy,
)

MEASURES = [von_neumann_entropy, effective_rank, effective_rank_singular, matrix_entropy]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=1):
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


def uneven(count, width, seed=0):
    """Tokens of different lengths, more alike in some directions than in others, and not around zero."""
    return normal(count, width, seed=seed) @ normal(width, width, seed=seed + 1) / width + 0.5


def entropy(shares):
    shares = np.array([share for share in shares if share > 1e-14])
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(("count", "width"), [(8, 8), (5, 12), (5, 5)])
def test_orthonormal_tokens_reach_the_bound(count, width):
    tokens = rotation(width)[:count]
    assert float(von_neumann_entropy(tokens)) == pytest.approx(math.log(count), abs=1e-12)
    assert float(effective_rank_singular(tokens)) == pytest.approx(count, rel=1e-12)
    assert float(matrix_entropy(tokens)) == pytest.approx(math.log(count), abs=1e-12)
    # Their differences from the mean are the corners of a simplex, which has a dimension less.
    assert float(effective_rank(tokens)) == pytest.approx(count - 1, rel=1e-12)


def test_many_tokens_reach_the_bound_of_the_width():
    cross = torch.cat([rotation(6), -rotation(6)])
    assert float(effective_rank(cross)) == pytest.approx(6, rel=1e-12)
    assert float(von_neumann_entropy(cross)) == pytest.approx(math.log(6), abs=1e-12)


def test_one_direction_has_entropy_zero_and_rank_one():
    line = normal(9, 1) * normal(1, 40, seed=3)
    assert float(von_neumann_entropy(line)) == pytest.approx(0, abs=1e-12)
    assert float(matrix_entropy(line)) == pytest.approx(0, abs=1e-12)
    assert float(effective_rank_singular(line)) == pytest.approx(1, rel=1e-9)
    assert float(effective_rank(line)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_tokens_have_rank_zero(dtype):
    """The mean of equal tokens is theirs up to round-off, which must not count as a direction."""
    same = normal(1, 40).to(dtype).expand(577, 40)
    assert float(effective_rank(same)) == 0
    assert float(von_neumann_entropy(same)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("count", "width"), [(12, 30), (30, 12)])
def test_measures_equal_their_formulas(count, width):
    tokens = uneven(count, width)
    x = tokens.numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    rest = x - x.mean(0)
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    sigma = np.linalg.svd(x, compute_uv=False)
    assert float(von_neumann_entropy(tokens)) == pytest.approx(entropy(np.linalg.eigvalsh(unit.T @ unit / count)))
    assert float(effective_rank(tokens)) == pytest.approx(math.exp(entropy(np.linalg.eigvalsh(rest.T @ rest / count))))
    assert float(effective_rank_singular(tokens)) == pytest.approx(math.exp(entropy(sigma / sigma.sum())))
    gram = np.linalg.eigvalsh(x @ x.T / np.trace(x @ x.T)).clip(min=0)
    assert float(matrix_entropy(tokens)) == pytest.approx(-math.log((gram**2).sum()))


def test_two_directions_have_the_entropy_of_a_coin():
    """Three tokens along one axis, one along another: eigenvalues 3/4 and 1/4, or √3 and 1 as singular values."""
    tokens = torch.eye(5)[[0, 0, 0, 2]]
    assert float(von_neumann_entropy(tokens)) == pytest.approx(entropy([0.75, 0.25]))
    assert float(matrix_entropy(tokens)) == pytest.approx(-math.log(0.75**2 + 0.25**2))
    root = math.sqrt(3)
    expected = math.exp(entropy([root / (root + 1), 1 / (root + 1)]))
    assert float(effective_rank_singular(tokens)) == pytest.approx(expected)
    assert float(effective_rank(tokens)) == pytest.approx(1)  # less their mean, two points lie on one line


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("count", "width"), [(12, 30), (30, 12)])
def test_invariant_to_scale_rotation_and_order(measure, count, width):
    tokens = uneven(count, width)
    expected = float(measure(tokens))
    for same in (1e-3 * tokens, 1e4 * tokens, tokens @ rotation(width), tokens.flip(0)):
        assert float(measure(same)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("measure", [von_neumann_entropy, effective_rank_singular, matrix_entropy])
def test_gram_and_covariance_agree(measure):
    """Zeros appended to the width, or zero tokens, turn one side into the other and add nothing."""
    tokens = uneven(30, 12)
    expected = float(measure(tokens))
    assert float(measure(torch.cat([tokens, torch.zeros(30, 50)], dim=1))) == pytest.approx(expected, rel=1e-9)
    assert float(measure(torch.cat([uneven(12, 30), torch.zeros(50, 30)]))) == pytest.approx(
        float(measure(uneven(12, 30))), rel=1e-9
    )


def test_effective_rank_ignores_a_common_offset():
    tokens = uneven(30, 12)
    wide = torch.cat([tokens, torch.zeros(30, 50)], dim=1)
    assert float(effective_rank(wide)) == pytest.approx(float(effective_rank(tokens)), rel=1e-9)
    assert float(effective_rank(tokens + 7)) == pytest.approx(float(effective_rank(tokens)), rel=1e-9)
    assert float(von_neumann_entropy(tokens + 7)) < 0.1 * float(von_neumann_entropy(tokens))


@pytest.mark.parametrize("measure", MEASURES)
def test_batch_equals_its_members(measure):
    tokens = torch.stack([uneven(7, 5, seed=seed) for seed in range(6)]).view(2, 3, 7, 5)
    tokens[0, 1, 2] = 0
    tokens[1, 1] = 0
    found = measure(tokens)
    assert found.shape == (2, 3)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert found[1, 1] == 0
    looped = torch.stack([measure(one) for one in tokens.flatten(0, 1)]).view(2, 3)
    torch.testing.assert_close(found, looped, rtol=1e-10, atol=1e-12)
    assert measure(tokens.float()).dtype == torch.float64


@pytest.mark.parametrize(("count", "width"), [(100, 400), (400, 100), (200, 200)])
def test_random_directions_have_pages_entropy(count, width):
    expected = math.log(min(count, width)) - min(count, width) / max(count, width) / 2
    drawn = von_neumann_entropy(torch.stack([normal(count, width, seed=seed) for seed in range(5)]))
    assert float(drawn.mean()) == pytest.approx(expected, abs=0.01)
    assert float(drawn.max()) < math.log(min(count, width))
