"""Anisotropy, on cases with known answers and at chance."""

import itertools

import numpy as np
import pytest
import torch

from analysis.alignment.metrics.anisotropy import anisotropy


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_anisotropy_equals_the_mean_over_all_pairs():
    tokens = normal(2, 3, 9, 5) + 0.4
    tokens[1, 2, 4] = 0
    found = anisotropy(tokens)
    assert found.shape == (2, 3)
    assert found.dtype == torch.float64
    for place in itertools.product(range(2), range(3)):
        x = tokens[place]
        pairs = [torch.cosine_similarity(x[i], x[j], dim=0) for i, j in itertools.permutations(range(9), 2)]
        assert float(found[place]) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-9)


def test_anisotropy_of_known_cases():
    assert float(anisotropy(torch.eye(6))) == pytest.approx(0, abs=1e-12)
    assert float(anisotropy((normal(8, 1).abs() + 0.1) @ normal(1, 5, seed=1))) == pytest.approx(1, abs=1e-6)
    assert float(anisotropy(torch.eye(6) - 1 / 6)) == pytest.approx(-1 / 5, abs=1e-6)
    chance = anisotropy(torch.stack([normal(50, 30, seed=s) for s in range(20)]))
    assert abs(float(chance.mean())) < 3 * float(chance.std()) / np.sqrt(20)
    assert float(chance.std()) == pytest.approx(np.sqrt(2 / (50 * 49 * 30)), rel=0.5)
