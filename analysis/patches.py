"""Does each patch say the word for what it shows? Similarity of patch states to the word embeddings of their labels.

Words are rows of the LLM's input embeddings, as in EmbeddingLens (arXiv:2602.00462, sec. 2.2); a patch has the label
that covers enough of it. Every number is a sum over patches, so that an image weighs as much as it has labelled ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """What the patches of a batch show.

    Attributes:
        shares: how much of each patch every class covers, (B, P, K).
        labels: class of each patch, (B, P); -1 where none covers enough of it.
    """

    shares: Tensor
    labels: Tensor


def similarity(states: Tensor, words: Tensor) -> Tensor:
    """Cosine of every patch with every word.

    Args:
        states: (B, P, H).
        words: (K, H).

    Returns:
        (B, P, K), float32.
    """
    return F.normalize(states.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T


def alignment(similar: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cosine between a labelled patch and its word, and the number of labelled patches.

    Args:
        similar: (B, P, K), from `similarity`.
        labels: (B, P).

    Returns:
        (B, 2); the first over the second is the mean.
    """
    there = labels >= 0
    own = similar.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.stack([(own * there).sum(dim=1), there.sum(dim=1).to(own)], dim=-1)


def retrieval(similar: Tensor, labels: Tensor) -> Tensor:
    """How many labelled patches are nearest to their own word among all labels, and the number of labelled patches.

    Args:
        similar: (B, P, K).
        labels: (B, P).

    Returns:
        (B, 2); the first over the second is the accuracy.
    """
    there = labels >= 0
    right = (similar.argmax(dim=-1) == labels) & there
    return torch.stack([right.sum(dim=1), there.sum(dim=1)], dim=-1).float()


def segmentation_counts(similar: Tensor, shares: Tensor) -> Tensor:
    """What each image adds to the IoU of labelling every patch with its nearest word.

    The same as counting the pixels of a map in which each patch is painted in one class; pixels without class are left
    out.

    Args:
        similar: (B, P, K).
        shares: (B, P, K).

    Returns:
        (B, 3 K): share of patches in both, in the truth, and in the prediction; see `analysis.segmentation.mean_iou`.
    """
    found = F.one_hot(similar.argmax(dim=-1), similar.shape[-1]).to(shares)
    both, true = (found * shares).sum(dim=1), shares.sum(dim=1)
    predicted = (found * shares.sum(dim=-1, keepdim=True)).sum(dim=1)
    return torch.cat([both, true, predicted], dim=-1)


def scores(similar: Tensor, patches: Patches) -> Iterator[tuple[str, Tensor]]:
    """Every number that says how well patches match their words.

    Args:
        similar: (B, P, K).
        patches: what they show.

    Yields:
        Name of a metric, and what each image adds to its sums.
    """
    yield "cosine", alignment(similar, patches.labels)
    yield "retrieval", retrieval(similar, patches.labels)
    yield "miou", segmentation_counts(similar, patches.shares)


def derangement(count: int, seed: int = 0) -> Tensor:
    """A permutation that leaves nothing in its place, (count): the control of permuted labels.

    Raises:
        ValueError: there are fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} label cannot be permuted")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = torch.empty_like(order)
    found[order] = order.roll(1)
    return found


def nearest_words(states: Tensor, words: Tensor, count: int) -> Tensor:
    """The words nearest to each patch.

    Args:
        states: (P, H).
        words: the whole vocabulary, (V, H), of unit norm.
        count: how many.

    Returns:
        Rows of `words`, (P, count), the nearest first.
    """
    return (F.normalize(states.float(), dim=-1).to(words.dtype) @ words.T).topk(count, dim=-1).indices
