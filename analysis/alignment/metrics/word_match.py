"""Similarity of patch states to the word embeddings of the patches' labels.

Words are rows of the LLM's input embeddings, as in EmbeddingLens (arXiv:2602.00462, sec. 2.2). Every number is a sum
over patches, so that an image weighs as much as it has labelled patches.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.alignment.context import AlignmentContext
from analysis.alignment.metrics.base import LAYER, RANDOM, LabelledBatch, Measure, Patches, ScoreRow, States
from probing.models.finite import finite_rows, zero_others

PERMUTATIONS = 5
"""Permutations of the labels in the control: with few labels, a single one may match better or worse than chance."""


class WordMatch(Measure):
    """Cosine with the label's word, retrieval and mIoU, for raw and for centred states and words.

    Args:
        context: the model and the labels' words.
        centres: mean state (H) by source and layer.
    """

    sources = (LAYER, RANDOM)

    def __init__(self, context: AlignmentContext, centres: dict[tuple[str, str], Tensor]) -> None:
        self.centres, self.words = centres, context.label_words
        self.orders = label_orders(len(context.annotate.words)).to(context.model.device)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields the scores of both variants, and those of permuted labels."""
        centred = states.values - self.centres[states.source, states.name]
        for variant, values in (("raw", states.values), ("centred", centred)):
            similarity = cosines(values, self.words[variant])
            for metric, scores in match_scores(similarity, states, batch.patches, self.orders):
                yield from match_rows(states, f"word_{metric}", variant, scores)


def label_orders(count: int) -> Tensor:
    """The identity and `PERMUTATIONS` permutations of the labels, (1 + PERMUTATIONS, count)."""
    return torch.stack([torch.arange(count), *(derangement(count, seed) for seed in range(PERMUTATIONS))])


def derangement(count: int, seed: int = 0) -> Tensor:
    """A random permutation without fixed points, (count), count at least 2."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def cosines(states: Tensor, words: Tensor) -> Tensor:
    """Cosine of every patch (B, P, H) with every word (K, H): (B, P, K), float32."""
    return F.normalize(states.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T


def nearest_words(states: Tensor, words: Tensor, count: int) -> Tensor:
    """Indices (P, count) of the nearest of words (V, H) of unit norm to each state (P, H), nearest first."""
    return (F.normalize(states.float(), dim=-1).to(words.dtype) @ words.T).topk(count, dim=-1).indices


def match_scores(
    similarity: Tensor, states: States, patches: Patches, orders: Tensor
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Scores how well patches match the words of their labels; see `label_sums`.

    Yields:
        Metric, its sums per image (R, B, n), and which images count (B).
    """
    finite = finite_rows(similarity) & states.finite
    controls = orders if states.source == LAYER else orders[:1]
    for metric, sums in label_sums(zero_others(similarity, finite), patches, controls):
        yield metric, (sums, finite)


def match_rows(states: States, metric: str, variant: str, scores: tuple[Tensor, Tensor]) -> Iterator[ScoreRow]:
    """Rows of the labels themselves, then of each permutation."""
    (own, *permuted), finite = scores
    yield ScoreRow(states.key("words", metric, variant), own, finite)
    for seed, sums in enumerate(permuted):
        yield ScoreRow(states.key("words", metric, variant, "permuted", seed), sums, finite)


def label_sums(similarity: Tensor, patches: Patches, orders: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What each image adds to the sums of cosine, retrieval and mIoU.

    Args:
        similarity: of patches and words, (B, P, K); only its order matters for all but the first metric.
        patches: what the patches show.
        orders: permutations of the labels, (R, K): label k is matched with the word of label `orders[r, k]`.

    Yields:
        `cosine` (R, B, 2): sum over labelled patches of the similarity to their word, and their number.
        `retrieval` (R, B, 2): how many of them are nearest to their own word among all, and their number.
        `miou` (R, B, 3 K): intersection, truth and prediction of a segmentation that gives each patch the label of its
            nearest word; see `analysis.evaluation.metrics.segmentation.mean_iou`.
    """
    labelled = patches.labels >= 0
    number = labelled.sum(dim=1).expand(len(orders), -1)
    words = orders[:, patches.labels.clamp(min=0)]
    cosine = similarity.expand(len(orders), -1, -1, -1).gather(-1, words[..., None])[..., 0]
    yield "cosine", torch.stack([(cosine * labelled).sum(dim=-1), number.to(cosine)], dim=-1)
    nearest = orders.argsort(dim=1)[:, similarity.argmax(dim=-1)]
    right = ((nearest == patches.labels) & labelled).sum(dim=-1)
    yield "retrieval", torch.stack([right, number], dim=-1).float()
    shares = patches.shares.expand(len(orders), -1, -1, -1)
    intersection, predicted = (
        torch.zeros_like(shares[:, :, 0]).scatter_add(-1, nearest, area)
        for area in (shares.gather(-1, nearest[..., None])[..., 0], shares.sum(dim=-1))
    )
    yield "miou", torch.cat([intersection, shares.sum(dim=2), predicted], dim=-1)
