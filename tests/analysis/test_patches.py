"""Patches and their words, on cases whose answers are known."""

import numpy as np
import pytest
import torch

from analysis.patches import Patches, alignment, derangement, nearest_words, retrieval, scores, similarity
from analysis.segmentation import class_counts, confusion, mean_iou
from probing.data.patch_labels import patch_labels, patch_shares


def test_patches_that_are_their_words():
    words = torch.eye(5, 8)
    labels = torch.tensor([[0, 1, -1, 3], [4, 4, 4, -1]])
    states = 3.0 * words[labels.clamp(min=0)]
    states[0, 0] += words[1] / 2  # a little of another word
    similar = similarity(states, words)
    total, number = alignment(similar, labels).unbind(-1)
    torch.testing.assert_close(total, torch.tensor([2 + 3 / (9.25**0.5), 3.0]))
    assert number.tolist() == [3, 3]
    assert retrieval(similar, labels).tolist() == [[3, 3], [3, 3]]
    assert alignment(similar[..., derangement(5)], labels)[1, 0] == 0


def test_an_image_without_labels_adds_nothing():
    labels = torch.full((1, 4), -1)
    for _, added in scores(torch.randn(1, 4, 3), Patches(torch.zeros(1, 4, 3), labels)):
        assert not added[..., : added.shape[-1] // 2].any() and torch.isfinite(added).all()


def test_chance():
    """Random states find their word as often as any other, and are orthogonal to it on average."""
    generator = torch.Generator().manual_seed(0)
    words, states = torch.randn(10, 64, generator=generator), torch.randn(40, 50, 64, generator=generator)
    labels = torch.randint(10, (40, 50), generator=generator)
    similar = similarity(states, words)
    right, number = retrieval(similar, labels).sum(0)
    assert abs(right / number - 0.1) < 4 * (0.09 / 2000) ** 0.5
    total, number = alignment(similar, labels).sum(0)
    assert abs(total / number) < 4 * (1 / 64 / 2000) ** 0.5


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
    own = dict(scores(similar, patches))["miou"][0]
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
