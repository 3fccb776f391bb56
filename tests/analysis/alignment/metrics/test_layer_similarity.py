"""Layers beside references: the same, unrelated, and with images permuted."""

import numpy as np
import torch

from analysis.alignment.metrics.layer_similarity import likeness
from analysis.alignment.metrics.similarity import linear_cka, neighbour_overlap


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_same_is_alike_and_the_unrelated_at_chance():
    """A rotated copy has CKA 1 and all neighbours; independent features, and permuted images, have neither."""
    layer = normal(200, 24)
    rotated = layer @ torch.linalg.qr(normal(24, 24, seed=1))[0]
    found = {
        (one.curve.teacher, one.curve.control, one.curve.metric): one
        for one in likeness({"3": layer}, {"same": rotated, "other": normal(200, 50, seed=2)})
    }
    whole = found["same", "none", "cka"].jackknife.interval()
    assert abs(whole.value - 1) < 1e-6 and whole.high - whole.low < 1e-6
    assert found["same", "none", "mutual_knn"].shares.mean() > 0.999
    for teacher, control in (("same", "permuted"), ("other", "none"), ("other", "permuted")):
        interval = found[teacher, control, "cka"].jackknife.interval()
        assert abs(interval.value) < 0.05 and interval.low < 0 < interval.high
        shares = found[teacher, control, "mutual_knn"].shares
        assert abs(shares.mean() - 10 / 199) < 4 * shares.std() / 200**0.5 + 0.005
    assert found["same", "none", "mutual_knn"].curve.variant == "k=10"


def test_numbers_are_those_of_each_pair_alone():
    layers = {"0": normal(40, 8), "1": normal(40, 8) @ normal(8, 8, seed=3) + 0.3 * normal(40, 8, seed=4)}
    references = {"tower": normal(40, 6, seed=5) + layers["0"][:, :6]}
    place = torch.arange(40) % 10
    for one in likeness(layers, references):
        if one.curve.control == "permuted":
            continue
        own, other = layers[one.curve.layer], references["tower"]
        if one.shares is not None:
            torch.testing.assert_close(one.shares, neighbour_overlap(own, other, 10))
        else:
            left_out = [linear_cka(own[place != group], other[place != group]) for group in range(10)]
            np.testing.assert_allclose(one.jackknife.whole, [linear_cka(own, other)], rtol=1e-9)
            np.testing.assert_allclose(one.jackknife.left_out[:, 0], left_out, rtol=1e-9)
