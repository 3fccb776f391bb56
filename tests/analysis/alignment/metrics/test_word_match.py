"""Patches and their words, on cases with known answers."""

import numpy as np
import torch
import torch.nn.functional as F

from analysis.alignment.metrics.base import Patches
from analysis.alignment.metrics.word_match import cosines, derangement, label_sums, nearest_words
from analysis.evaluation.metrics.segmentation import class_counts, confusion, mean_iou
from probing.data.patch_labels import patch_labels, patch_shares


def sums(similar, labels, orders=None):
    """`label_sums` for shares of zero or one."""
    shares = F.one_hot(labels.clamp(min=0), similar.shape[-1]).float() * (labels >= 0)[..., None]
    orders = torch.arange(similar.shape[-1])[None] if orders is None else orders
    return dict(label_sums(similar, Patches(shares, labels), orders))


def test_patches_that_equal_their_words_match():
    words = torch.eye(5, 8)
    labels = torch.tensor([[0, 1, -1, 3], [4, 4, 4, -1]])
    states = 3.0 * words[labels.clamp(min=0)]
    states[0, 0] += words[1] / 2  # a little of another word
    orders = torch.stack([torch.arange(5), derangement(5)])
    numbers = sums(cosines(states, words), labels, orders)
    total, number = numbers["cosine"][0].unbind(-1)
    torch.testing.assert_close(total, torch.tensor([2 + 3 / (9.25**0.5), 3.0]))
    assert number.tolist() == [3, 3]
    assert numbers["retrieval"][0].tolist() == [[3, 3], [3, 3]]
    assert numbers["cosine"][1, 1, 0] == 0 and not numbers["retrieval"][1, :, 0].any()


def test_image_without_labels_adds_zero():
    labels = torch.full((1, 4), -1)
    for added in sums(torch.randn(1, 4, 3), labels).values():
        assert not added[..., : added.shape[-1] // 2].any() and torch.isfinite(added).all()


def test_random_states_match_at_chance():
    generator = torch.Generator().manual_seed(0)
    words, states = torch.randn(10, 64, generator=generator), torch.randn(40, 50, 64, generator=generator)
    labels = torch.randint(10, (40, 50), generator=generator)
    numbers = sums(cosines(states, words), labels)
    right, number = numbers["retrieval"][0].sum(0)
    assert abs(right / number - 0.1) < 4 * (0.09 / 2000) ** 0.5
    total, number = numbers["cosine"][0].sum(0)
    assert abs(total / number) < 4 * (1 / 64 / 2000) ** 0.5


def test_permuted_labels_equal_permuted_similarities():
    generator = torch.Generator().manual_seed(1)
    similar, shares = torch.randn(3, 9, 6, generator=generator), torch.rand(3, 9, 6, generator=generator)
    patches = Patches(shares, torch.randint(-1, 6, (3, 9), generator=generator))
    orders = torch.stack([torch.arange(6), derangement(6, 1), derangement(6, 2)])
    for metric, values in label_sums(similar, patches, orders):
        for order, own in zip(orders, values, strict=True):
            alone = dict(label_sums(similar[..., order], patches, orders[:1]))[metric][0]
            torch.testing.assert_close(own, alone)


def test_iou_equals_confusion_matrix_over_pixels():
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), size=(24, 32))
    shares = patch_shares(labels, 3, (4, 4))
    states, words = torch.randn(1, 16, 6), torch.randn(3, 6)
    similar = cosines(states, words)
    found = similar.argmax(-1).view(4, 4).repeat_interleave(6, 0).repeat_interleave(8, 1)
    counts = class_counts(confusion(torch.from_numpy(labels), found, 3))
    patches = Patches(torch.from_numpy(shares)[None], torch.from_numpy(patch_labels(shares))[None])
    own = dict(label_sums(similar, patches, torch.arange(3)[None]))["miou"][0, 0]
    np.testing.assert_allclose(own * 6 * 8, counts.numpy(), rtol=1e-9)
    np.testing.assert_allclose(mean_iou(own.numpy()), mean_iou(counts.numpy()))


def test_derangement_has_no_fixed_points():
    for count in (2, 3, 133):
        order = derangement(count)
        assert sorted(order.tolist()) == list(range(count)) and not (order == torch.arange(count)).any()


def test_nearest_words():
    words = torch.nn.functional.normalize(torch.randn(50, 16), dim=-1)
    states = 2 * words[[7, 30]] + 0.5 * words[[8, 31]]
    assert nearest_words(states, words, 3)[:, 0].tolist() == [7, 30]
