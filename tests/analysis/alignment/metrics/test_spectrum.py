"""Entropies and ranks of tokens whose spectrum is known."""

import math

import numpy as np
import pytest
import torch

from analysis.alignment.metrics.spectrum import (
    effective_rank,
    effective_rank_singular,
    entropy_bound,
    matrix_entropy,
    von_neumann_entropy,
)


def collision_entropy(tokens):
    return matrix_entropy(tokens, 2)


MEASURES = [von_neumann_entropy, effective_rank, effective_rank_singular, collision_entropy]


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
    assert entropy_bound(count, width) == pytest.approx(math.log(count))
    assert float(von_neumann_entropy(tokens)) == pytest.approx(entropy_bound(count, width), abs=1e-12)
    assert float(effective_rank_singular(tokens)) == pytest.approx(count, rel=1e-12)
    for alpha in (0.5, 1, 2, 5):
        assert float(matrix_entropy(tokens, alpha)) == pytest.approx(math.log(count), abs=1e-12)
    # Their differences from the mean are the corners of a simplex, which has a dimension less.
    assert float(effective_rank(tokens)) == pytest.approx(count - 1, rel=1e-12)
    assert entropy_bound(count, width, is_centred=True) == pytest.approx(math.log(count - 1))


def test_the_width_is_the_bound_where_tokens_are_many():
    cross = torch.cat([rotation(6), -rotation(6)])
    assert float(effective_rank(cross)) == pytest.approx(math.exp(entropy_bound(12, 6, is_centred=True)), rel=1e-12)
    assert float(von_neumann_entropy(cross)) == pytest.approx(entropy_bound(12, 6), abs=1e-12)


def test_tokens_of_one_direction_have_entropy_zero_and_rank_one():
    line = normal(9, 1) * normal(1, 40, seed=3)
    assert float(von_neumann_entropy(line)) == pytest.approx(0, abs=1e-12)
    assert float(collision_entropy(line)) == pytest.approx(0, abs=1e-12)
    assert float(effective_rank_singular(line)) == pytest.approx(1, rel=1e-9)
    assert float(effective_rank(line)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_differences_no_rank_is_left(dtype):
    """The mean of equal tokens is theirs up to round-off, which must not pass for a direction."""
    same = normal(1, 40).to(dtype).expand(577, 40)
    assert float(effective_rank(same)) == 0
    assert float(von_neumann_entropy(same)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("count", "width"), [(12, 30), (30, 12)])
def test_each_is_its_formula(count, width):
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
    assert float(matrix_entropy(tokens, 3)) == pytest.approx(math.log((gram**3).sum()) / -2)


def test_a_state_of_two_directions_has_the_entropy_of_a_coin():
    """Three tokens along one axis, one along another: eigenvalues 3/4 and 1/4, or √3 and 1 as singular values."""
    tokens = torch.eye(5)[[0, 0, 0, 2]]
    assert float(von_neumann_entropy(tokens)) == pytest.approx(entropy([0.75, 0.25]))
    assert float(collision_entropy(tokens)) == pytest.approx(-math.log(0.75**2 + 0.25**2))
    root = math.sqrt(3)
    expected = math.exp(entropy([root / (root + 1), 1 / (root + 1)]))
    assert float(effective_rank_singular(tokens)) == pytest.approx(expected)
    assert float(effective_rank(tokens)) == pytest.approx(1)  # less their mean, two points lie on one line


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("count", "width"), [(12, 30), (30, 12)])
def test_scale_rotation_and_order_change_nothing(measure, count, width):
    tokens = uneven(count, width)
    expected = float(measure(tokens))
    for same in (1e-3 * tokens, 1e4 * tokens, tokens @ rotation(width), tokens.flip(0)):
        assert float(measure(same)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("measure", [von_neumann_entropy, effective_rank_singular, collision_entropy])
def test_gram_and_covariance_agree(measure):
    """Zeros appended to the width, or zero tokens, turn one side into the other and add nothing."""
    tokens = uneven(30, 12)
    expected = float(measure(tokens))
    assert float(measure(torch.cat([tokens, torch.zeros(30, 50)], dim=1))) == pytest.approx(expected, rel=1e-9)
    assert float(measure(torch.cat([uneven(12, 30), torch.zeros(50, 30)]))) == pytest.approx(
        float(measure(uneven(12, 30))), rel=1e-9
    )


def test_centring_is_by_all_tokens_and_its_sides_agree_too():
    tokens = uneven(30, 12)
    wide = torch.cat([tokens, torch.zeros(30, 50)], dim=1)
    assert float(effective_rank(wide)) == pytest.approx(float(effective_rank(tokens)), rel=1e-9)
    assert float(effective_rank(tokens + 7)) == pytest.approx(float(effective_rank(tokens)), rel=1e-9)
    assert float(von_neumann_entropy(tokens + 7)) < 0.1 * float(von_neumann_entropy(tokens))


@pytest.mark.parametrize("measure", MEASURES)
def test_batches_are_their_members(measure):
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


def test_renyi_goes_through_von_neumann_and_falls_with_the_order():
    tokens = uneven(20, 10)
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    assert float(matrix_entropy(unit, 1)) == pytest.approx(float(von_neumann_entropy(tokens)), rel=1e-12)
    below, at, above = (float(matrix_entropy(tokens, alpha)) for alpha in (0.999, 1, 1.001))
    assert below > at > above
    assert (below + above) / 2 == pytest.approx(at, abs=1e-5)
    assert below == pytest.approx(above, abs=1e-2)
    assert float(matrix_entropy(tokens, 1e-6)) == pytest.approx(math.log(10), abs=1e-4)
    flat = torch.cat([tokens[:, :3], torch.zeros(20, 7)], dim=1) @ rotation(10)
    assert float(matrix_entropy(flat, 1e-3)) == pytest.approx(math.log(3), abs=1e-2)  # round-off is no dimension
    largest = torch.linalg.eigvalsh(tokens.T @ tokens).max() / tokens.square().sum()
    assert float(matrix_entropy(tokens, 2000)) == pytest.approx(-math.log(largest), rel=1e-3)


@pytest.mark.parametrize(("count", "width"), [(100, 400), (400, 100), (200, 200)])
def test_random_directions_lie_where_chance_puts_them(count, width):
    expected = math.log(min(count, width)) - min(count, width) / max(count, width) / 2
    drawn = von_neumann_entropy(torch.stack([normal(count, width, seed=seed) for seed in range(5)]))
    assert float(drawn.mean()) == pytest.approx(expected, abs=0.01)
    assert float(drawn.max()) < entropy_bound(count, width)


def test_misuse_is_refused():
    for measure in MEASURES:
        with pytest.raises(ValueError, match="expected finite tokens"):
            measure(torch.ones(4))
        with pytest.raises(ValueError, match="expected finite tokens"):
            measure(torch.full((3, 4), torch.nan))
        with pytest.raises(ValueError, match="expected finite tokens"):
            measure(torch.ones(0, 4))
    with pytest.raises(ValueError, match="N at least 2"):
        effective_rank(torch.ones(1, 4))
    with pytest.raises(ValueError, match="span no dimension"):
        entropy_bound(1, 4, is_centred=True)
    for alpha in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="order"):
            matrix_entropy(torch.ones(3, 4), alpha)
