"""CKA and shared neighbours, on cases with known answers and at chance."""

import itertools

import numpy as np
import pytest
import torch

from analysis.alignment.metrics import similarity
from analysis.alignment.metrics.similarity import linear_cka, nearest_neighbours, shared_neighbours


def neighbour_overlap(one, other, k):
    return shared_neighbours(nearest_neighbours(one, k), nearest_neighbours(other, k))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=1):
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


def hsic(k, l):  # noqa: E741
    """The unbiased estimator as a mean over tuples of different items: pairs, quadruples and triples."""
    n = len(k)
    pairs = np.mean([k[i, j] * l[i, j] for i, j in itertools.permutations(range(n), 2)])
    quadruples = np.mean([k[i, j] * l[q, r] for i, j, q, r in itertools.permutations(range(n), 4)])
    triples = np.mean([k[i, j] * l[i, q] for i, j, q in itertools.permutations(range(n), 3)])
    return pairs + quadruples - 2 * triples


def test_cka_equals_the_estimator_summed_over_tuples():
    x, y = normal(7, 3) + 1, normal(7, 5, seed=1)
    y[:, :2] += x[:, :2]
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()  # noqa: E741
    expected = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)


def test_cka_equals_the_formula_of_traces():
    x, y = normal(40, 3), normal(40, 60, seed=1)
    y[:, :3] += 2 * x

    def traces(k, l):  # noqa: E741
        k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
        n, one = len(k), torch.ones(len(k), dtype=k.dtype)
        middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return ((k @ l).trace() + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = float(traces(k, l) / (traces(k, k) * traces(l, l)).sqrt())
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(x + 1e7, y - 1e7) == pytest.approx(expected, rel=1e-6)


def test_cka_ignores_rotation_scale_and_shift():
    x = normal(50, 20)
    for same in (x, -3 * x, x @ rotation(20), x + 5, torch.cat([x, torch.ones(50, 9)], dim=1), x.float()):
        assert linear_cka(x, same) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, x @ normal(20, 20, seed=2)) < 0.99


@pytest.mark.parametrize("widths", [(5, 7), (200, 300)])
def test_cka_of_independent_features_is_about_zero(widths):
    drawn = [linear_cka(normal(30, widths[0], seed=s), normal(30, widths[1], seed=s + 99)) for s in range(20)]
    assert abs(np.mean(drawn)) < 3 * np.std(drawn, ddof=1) / np.sqrt(20)
    assert min(drawn) < 0 < max(drawn)


def test_cka_of_constant_features_is_zero():
    x = normal(30, 8)
    assert linear_cka(x, torch.full((30, 8), 0.1)) == 0
    assert linear_cka(x, torch.zeros(30, 8)) == 0
    alone = torch.full((30, 8), 0.1)
    alone[3] = 0.7
    assert linear_cka(x, alone) == 0


def test_overlap_ignores_rotation_and_lengths():
    x = normal(40, 12)
    for same in (x, 5 * x, x @ rotation(12), x * torch.rand(40, 1, generator=torch.Generator().manual_seed(0))):
        assert neighbour_overlap(x, same, 7).tolist() == [1.0] * 40


def test_overlap_equals_a_plain_count(monkeypatch):
    monkeypatch.setattr(similarity, "CHUNK", 7)
    one, other = normal(25, 6), normal(25, 9, seed=1)
    other[:, :6] += one

    def near(x, i):
        x = (x / x.norm(dim=1, keepdim=True)).numpy()
        distance = np.linalg.norm(x - x[i], axis=1)  # Euclidean, of unit rows
        return {int(j) for j in np.argsort(distance) if j != i and np.sum(distance < distance[j]) <= 4}

    expected = [len(near(one, i) & near(other, i)) / 4 for i in range(25)]
    found = neighbour_overlap(one, other, 4)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected)
    assert 0.2 < np.mean(expected) < 0.9


def test_overlap_of_independent_features_is_at_chance():
    drawn = [float(neighbour_overlap(normal(60, 8, seed=s), normal(60, 30, seed=s + 99), 10).mean()) for s in range(20)]
    assert abs(np.mean(drawn) - 10 / 59) < 3 * np.std(drawn, ddof=1) / np.sqrt(20)
    assert neighbour_overlap(normal(9, 3), normal(9, 3, seed=1), 8).tolist() == [1.0] * 9  # chance is 1 there
