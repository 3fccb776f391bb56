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


def scores(similar: Tensor, patches: Patches, orders: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every number that says how well patches match their words, and how well they match words of other labels.

    Args:
        similar: of patches and words, (B, P, K); for all but the first metric their order is enough.
        patches: what they show.
        orders: permutations of the labels, (R, K): label k is given the word of label `orders[r, k]`.

    Yields:
        Name of a metric, and what each image adds to its sums:

        `cosine` (R, B, 2): sum of the similarity of labelled patches and their word, and their number.
        `retrieval` (R, B, 2): how many of them are nearest to their own word among all, and their number.
        `miou` (R, B, 3 K): of painting every patch in the label whose word is nearest, the shares of patches in both,
            in the truth, and in the prediction, as if pixels were counted; see
            `analysis.evaluation.metrics.segmentation.mean_iou`.
    """
    there = patches.labels >= 0
    number = there.sum(dim=1).expand(len(orders), -1)
    own = orders[:, patches.labels.clamp(min=0)]
    cosine = similar.expand(len(orders), -1, -1, -1).gather(-1, own[..., None])[..., 0]
    yield "cosine", torch.stack([(cosine * there).sum(dim=-1), number.to(cosine)], dim=-1)
    nearest = orders.argsort(dim=1)[:, similar.argmax(dim=-1)]
    right = ((nearest == patches.labels) & there).sum(dim=-1)
    yield "retrieval", torch.stack([right, number], dim=-1).float()
    shares = patches.shares.expand(len(orders), -1, -1, -1)
    both, predicted = (
        torch.zeros_like(shares[:, :, 0]).scatter_add(-1, nearest, painted)
        for painted in (shares.gather(-1, nearest[..., None])[..., 0], shares.sum(dim=-1))
    )
    yield "miou", torch.cat([both, shares.sum(dim=2), predicted], dim=-1)


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
