"""Layers compared with references: the same, unrelated, with permuted images, and with images that are not finite."""

import numpy as np
import torch

from analysis.alignment.metrics.pooled_similarity import cka_jackknives, compare_pooled, mutual_knn
from analysis.alignment.metrics.similarity import linear_cka
from tests.analysis.alignment.metrics.test_similarity import neighbour_overlap


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rotated_copy_is_similar_and_others_are_at_chance():
    layer = normal(200, 24)
    rotated = layer @ torch.linalg.qr(normal(24, 24, seed=1))[0]
    table, rows = compare_pooled({"3": layer}, {"same": rotated, "other": normal(200, 50, seed=2)}, "val")
    cka = {(row.key.teacher, row.key.control): row.interval for row in rows}
    overlap = {(key.teacher, key.control): shares for key, shares in table.items()}
    whole = cka["same", "none"]
    assert abs(whole.value - 1) < 1e-6 and whole.high - whole.low < 1e-6
    assert overlap["same", "none"].mean() > 0.999
    for pair in (("same", "permuted"), ("other", "none"), ("other", "permuted")):
        assert abs(cka[pair].value) < 0.05 and cka[pair].low < 0 < cka[pair].high
        shares = overlap[pair]
        assert abs(shares.mean() - 10 / 199) < 4 * shares.std() / 200**0.5 + 0.005
    assert {key.variant for key in table} == {"k=10"}


def test_numbers_equal_those_of_each_pair_alone():
    layers = {"0": normal(40, 8), "1": normal(40, 8) @ normal(8, 8, seed=3) + 0.3 * normal(40, 8, seed=4)}
    tower = normal(40, 6, seed=5) + layers["0"][:, :6]
    group = torch.arange(40) % 10
    overlaps, jackknives = mutual_knn(layers, {"tower": tower}, 10), cka_jackknives(layers, {"tower": tower})
    for name, own in layers.items():
        torch.testing.assert_close(overlaps[name, "tower", "none"], neighbour_overlap(own, tower, 10))
        jackknife = jackknives[name, "tower", "none"]
        left_out = [linear_cka(own[group != number], tower[group != number]) for number in range(10)]
        np.testing.assert_allclose(jackknife.whole, [linear_cka(own, tower)], rtol=1e-9)
        np.testing.assert_allclose(jackknife.left_out[:, 0], left_out, rtol=1e-9)


def test_images_that_are_not_finite_are_left_out(caplog):
    layers, tower = {"0": normal(30, 8), "1": normal(30, 8, seed=1)}, normal(30, 6, seed=2)
    layers["0"][4] = torch.nan
    layers["1"][:20] = torch.nan
    table, rows = compare_pooled(layers, {"tower": tower}, "val")
    rest = torch.arange(30) != 4
    found = {(row.key.layer, row.key.control): row for row in rows}
    assert abs(found["0", "none"].interval.value - linear_cka(layers["0"][rest], tower[rest])) < 1e-9
    assert found["0", "none"].n == 29 and found["1", "none"].n == 10 and np.isnan(found["1", "none"].interval.value)
    assert all(np.isnan(shares).sum() == (1 if key.layer == "0" else 30) for key, shares in table.items())
    assert "too few images" in caplog.text
