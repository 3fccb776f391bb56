"""Pairs are scored as a brute-force reading of the rule does."""

import numpy as np
import torch

from analysis.evaluation.metrics.depth_pairs import row_score, score_pairs
from probing.data.da2k import Pair


def pairs(rng, rows, columns, n):
    return torch.from_numpy(rng.integers(0, [rows, columns], size=(n, 2, 2)))


def test_a_constant_map_scores_one_half():
    many = pairs(np.random.default_rng(0), 20, 30, 500)
    assert score_pairs(torch.full((20, 30), 0.7), many).tolist() == [0.5] * 500


def test_every_pair_against_the_rule_in_words():
    rng = np.random.default_rng(1)
    depth = rng.integers(0, 4, size=(20, 30)).astype(float)
    many = pairs(rng, 20, 30, 500)
    for (closer, farther), got in zip(many.tolist(), score_pairs(torch.from_numpy(depth), many).tolist(), strict=True):
        near, far = depth[closer[0]][closer[1]], depth[farther[0]][farther[1]]
        assert got == (1.0 if near > far else 0.0 if near < far else 0.5)


def test_the_row_alone():
    assert row_score([Pair((9, 0), (2, 5)), Pair((1, 0), (2, 5)), Pair((3, 0), (3, 5))]).tolist() == [1.0, 0.0, 0.5]
