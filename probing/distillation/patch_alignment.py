"""Patch-aligned training: what the projector makes of the patches that show a thing is drawn to the word for it.

For every image and every word that labels at least one of its patches: v is the mean of the projector's output over
these patches, w the mean of the word's rows in the LLM's input embeddings. `cosine` is 1 - cos(v, w), the mask-pooled
form of cosine alignment with frozen features (as in REPA, arXiv:2410.06940, and VIRAL, arXiv:2509.07979); `contrastive`
is InfoNCE (arXiv:1807.03748) over the words of the same image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probing.distillation.recipe import PatchAlignmentRecipe
from probing.models.word_embeddings import word_ids


@dataclass(frozen=True)
class Pooled:
    """Patches pooled by image and word.

    Attributes:
        vectors: (pairs, H).
        image: (pairs) which image.
        word: (pairs) which of `words`.
        words: (W) numbers of the words that occur.
    """

    vectors: Tensor
    image: Tensor
    word: Tensor
    words: Tensor


def pool_patches(features: Tensor, labels: Tensor) -> Pooled:
    """Means over the patches of every word in every image.

    Args:
        features: (images, patches, H).
        labels: (images, patches) number of a word, -1 for none.
    """
    words = labels[labels >= 0].unique()
    member = (labels[:, :, None] == words).to(features.dtype)
    counts = member.sum(dim=1)
    image, word = counts.nonzero(as_tuple=True)
    sums = member.transpose(1, 2) @ features  # a product rather than scattered sums: the same bits every time
    return Pooled(sums[image, word] / counts[image, word, None], image, word, words)


def cosine_loss(pooled: Pooled, vectors: Tensor) -> Tensor:
    """Sum over pairs of 1 - cos(v, w); `vectors` (W, H) are those of `pooled.words`."""
    return (1 - F.cosine_similarity(pooled.vectors, vectors[pooled.word], dim=1)).sum()


def contrastive_loss(pooled: Pooled, vectors: Tensor, temperature: float) -> Tensor:
    """Sum over pairs of the cross-entropy of cos(v, w) / temperature over the words of the same image.

    A pair whose image has no other word has nothing to be told apart from, and adds 0.
    """
    cosines = F.normalize(pooled.vectors, dim=1) @ F.normalize(vectors, dim=1).T
    own = (pooled.word[:, None] == torch.arange(len(vectors), device=vectors.device)).to(cosines.dtype)
    there = (pooled.image[:, None] == pooled.image).to(cosines.dtype) @ own
    logits = (cosines / temperature).masked_fill(there == 0, -torch.inf)
    return F.cross_entropy(logits, pooled.word, reduction="sum")


def count_pairs(labels: Tensor, least: int) -> Tensor:
    """Number of (image, word) pairs, those of images with fewer than `least` words left out.

    Args:
        labels: (images, patches) number of a word, -1 for none.
        least: 1 counts all.
    """
    image, _ = (labels >= 0).nonzero(as_tuple=True)
    pairs = torch.stack((image, labels[labels >= 0])).unique(dim=1)
    counts = pairs[0].bincount()
    return counts[counts >= least].sum()


def attach_pairs(batches: list[dict[str, Any]], least: int, device: torch.device, world: int) -> None:
    """Puts `patches` into every micro-batch of a step that has images.

    The pairs of all micro-batches are counted together, and those of the other processes too: the mean is over the
    global batch, however it is cut up.

    Args:
        batches: micro-batches of this process; `patch_labels` is taken out of them.
        least: see `count_pairs`.
        device: of this process.
        world: number of processes.
    """
    found = [(batch, batch.pop("patch_labels")) for batch in batches if "patch_labels" in batch]
    pairs = torch.zeros((), dtype=torch.long, device=device)
    for _, labels in found:
        pairs += count_pairs(labels, least).to(device)
    if world > 1:
        torch.distributed.all_reduce(pairs)
    for batch, labels in found:
        batch["patches"] = {"labels": labels, "pairs": pairs}


@dataclass(frozen=True)
class PatchAlignment:
    """The loss of a stage.

    Attributes:
        name: in the log.
        weight: in the sum that is minimised.
        temperature: of the contrast; None for `cosine`.
        ids: (words, tokens) every word's tokens, filled up.
        shares: (words, tokens) one over the number of a word's tokens; 0 where filled up.
    """

    name: str
    weight: float
    temperature: float | None
    ids: Tensor
    shares: Tensor

    @classmethod
    def of(cls, recipe: PatchAlignmentRecipe, tokenizer: Any, words: Sequence[str]) -> "PatchAlignment":
        """Takes the words apart; raises UserError where the tokenizer makes nothing of one."""
        tokens = [torch.tensor(word_ids(tokenizer, word)) for word in words]
        shares = [torch.full((len(one),), 1 / len(one)) for one in tokens]
        pad = torch.nn.utils.rnn.pad_sequence
        temperature = recipe.temperature if recipe.loss == "contrastive" else None
        name = f"patches.{recipe.loss}"
        return cls(name, recipe.weight, temperature, pad(tokens, batch_first=True), pad(shares, batch_first=True))

    @property
    def least(self) -> int:
        """Words that an image must have to count: a contrast needs two."""
        return 1 if self.temperature is None else 2

    @torch.no_grad()
    def word_vectors(self, embed: nn.Module, words: Tensor) -> Tensor:
        """Vectors (W, H) of some words as they are now, and as constants.

        Those of `probing.models.word_embeddings.word_vectors`. The module is called rather than its table read, so
        that it may be sharded, or scale what it gives.
        """
        at = words.to(self.ids.device)
        rows = embed(self.ids[at].to(words.device)).float()
        return (rows * self.shares[at].to(rows)[:, :, None]).sum(dim=1)

    def loss(self, features: Tensor, labels: Tensor, pairs: Tensor, embed: nn.Module) -> Tensor:
        """This micro-batch's part of the mean over all pairs of the global batch.

        Args:
            features: the projector's output, (images, patches, H).
            labels: (images, patches) number of a word, -1 for none.
            pairs: number of pairs in the global batch, a scalar.
            embed: the LLM's input embeddings.
        """
        with torch.autocast(features.device.type, enabled=False):
            pooled = pool_patches(features.float(), labels)
            vectors = self.word_vectors(embed, pooled.words)
            if self.temperature is None:
                total = cosine_loss(pooled, vectors)
            else:
                total = contrastive_loss(pooled, vectors, self.temperature)
            return total / pairs.clamp(min=1)
