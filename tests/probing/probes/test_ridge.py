"""Sums of the ridge readout."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from probing.probes.ridge import RidgeSums


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_readout_equals_scikit_learn_in_float64(monkeypatch, offset, precision):
    """Also with products in float32, as on accelerators, and where means are a hundred times the spread, as in LLMs."""
    monkeypatch.setattr("probing.probes.ridge.batch_precision", lambda device: precision)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 9, 24, generator=generator) + offset * torch.randn(24, generator=generator)
    targets = {name: torch.randn(60, 9, width, generator=generator) + offset for name, width in (("a", 3), ("b", 5))}
    targets["a"] += x[..., :3]
    chosen = torch.rand(60, generator=generator) < 0.8
    x[~chosen] = torch.nan
    sums = RidgeSums()
    for rows in torch.arange(60).split(7):
        sums.add(x[rows], {name: y[rows] for name, y in targets.items()}, chosen[rows])
    states = x[chosen].flatten(0, 1).double().numpy()
    for name, y in targets.items():
        weight, bias = sums.solve(1e-3)[name]
        ridge = Ridge(alpha=1e-3 * len(states) * np.var(states, axis=0).mean())
        ridge.fit(states, y[chosen].flatten(0, 1).double().numpy())
        np.testing.assert_allclose(weight, ridge.coef_, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(bias, ridge.intercept_, rtol=1e-4, atol=1e-4)


def test_sums_of_no_images_change_nothing():
    sums = RidgeSums()
    sums.add(torch.randn(4, 2, 3), {"a": torch.randn(4, 2, 5)}, torch.ones(4).bool())
    empty = RidgeSums.zeros(3, {"a": 5}, torch.device("cpu"))
    assert empty.sums.keys() == sums.sums.keys()
    for name, value in empty.sums.items():
        assert value.shape == sums.sums[name].shape and not value.any() and value.dtype == torch.float64
    assert torch.isnan(empty.solve(1e-3)["a"][0]).all()
