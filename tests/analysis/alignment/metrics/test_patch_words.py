"""Patches and their words, on cases whose answers are known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.alignment.metrics.patch_words import Patches, derangement, nearest_words, scores, similarity
from analysis.evaluation.metrics.segmentation import class_counts, confusion, mean_iou
from probing.data.patch_labels import patch_labels, patch_shares


def found(similar, labels, orders=None):
    """What `scores` gives for shares of zero or one."""
    shares = F.one_hot(labels.clamp(min=0), similar.shape[-1]).float() * (labels >= 0)[..., None]
    orders = torch.arange(similar.shape[-1])[None] if orders is None else orders
    return dict(scores(similar, Patches(shares, labels), orders))


def test_patches_that_are_their_words():
    words = torch.eye(5, 8)
    labels = torch.tensor([[0, 1, -1, 3], [4, 4, 4, -1]])
    states = 3.0 * words[labels.clamp(min=0)]
    states[0, 0] += words[1] / 2  # a little of another word
    orders = torch.stack([torch.arange(5), derangement(5)])
    numbers = found(similarity(states, words), labels, orders)
    total, number = numbers["cosine"][0].unbind(-1)
    torch.testing.assert_close(total, torch.tensor([2 + 3 / (9.25**0.5), 3.0]))
    assert number.tolist() == [3, 3]
    assert numbers["retrieval"][0].tolist() == [[3, 3], [3, 3]]
    assert numbers["cosine"][1, 1, 0] == 0 and not numbers["retrieval"][1, :, 0].any()


def test_an_image_without_labels_adds_nothing():
    labels = torch.full((1, 4), -1)
    for added in found(torch.randn(1, 4, 3), labels).values():
        assert not added[..., : added.shape[-1] // 2].any() and torch.isfinite(added).all()


def test_chance():
    """Random states find their word as often as any other, and are orthogonal to it on average."""
    generator = torch.Generator().manual_seed(0)
    words, states = torch.randn(10, 64, generator=generator), torch.randn(40, 50, 64, generator=generator)
    labels = torch.randint(10, (40, 50), generator=generator)
    numbers = found(similarity(states, words), labels)
    right, number = numbers["retrieval"][0].sum(0)
    assert abs(right / number - 0.1) < 4 * (0.09 / 2000) ** 0.5
    total, number = numbers["cosine"][0].sum(0)
    assert abs(total / number) < 4 * (1 / 64 / 2000) ** 0.5


def test_permuted_labels_are_words_in_another_order():
    """Against the similarities themselves permuted, one order after the other."""
    generator = torch.Generator().manual_seed(1)
    similar, shares = torch.randn(3, 9, 6, generator=generator), torch.rand(3, 9, 6, generator=generator)
    patches = Patches(shares, torch.randint(-1, 6, (3, 9), generator=generator))
    orders = torch.stack([torch.arange(6), derangement(6, 1), derangement(6, 2)])
    for metric, values in scores(similar, patches, orders):
        for order, own in zip(orders, values, strict=True):
            alone = dict(scores(similar[..., order], patches, orders[:1]))[metric][0]
            torch.testing.assert_close(own, alone)


def test_iou_is_that_of_the_painted_pixels():
    """Against a confusion matrix over pixels, every patch painted in one class."""
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), size=(24, 32))
    shares = patch_shares(labels, 3, (4, 4))
    states, words = torch.randn(1, 16, 6), torch.randn(3, 6)
    similar = similarity(states, words)
    found = similar.argmax(-1).view(4, 4).repeat_interleave(6, 0).repeat_interleave(8, 1)
    counts = class_counts(confusion(torch.from_numpy(labels), found, 3))
    patches = Patches(torch.from_numpy(shares)[None], torch.from_numpy(patch_labels(shares))[None])
    own = dict(scores(similar, patches, torch.arange(3)[None]))["miou"][0, 0]
    np.testing.assert_allclose(own * 6 * 8, counts.numpy(), rtol=1e-9)
    np.testing.assert_allclose(mean_iou(own.numpy()), mean_iou(counts.numpy()))


def test_permuted_labels_leave_none_in_its_place():
    for count in (2, 3, 133):
        order = derangement(count)
        assert sorted(order.tolist()) == list(range(count)) and not (order == torch.arange(count)).any()
    with pytest.raises(ValueError, match="cannot be permuted"):
        derangement(1)


def test_the_nearest_words_are_found():
    words = torch.nn.functional.normalize(torch.randn(50, 16), dim=-1)
    states = 2 * words[[7, 30]] + 0.5 * words[[8, 31]]
    assert nearest_words(states, words, 3)[:, 0].tolist() == [7, 30]
