"""Patch-aligned training: pulls the projector's output for the patches of an object towards the word for it.

For every image and every word that labels at least one of its patches: v is the mean of the projector's output over
these patches, w the mean of the word's rows in the LLM's input embeddings. `cosine` is 1 - cos(v, w), the mask-pooled
form of cosine alignment with frozen features (as in REPA, arXiv:2410.06940, and VIRAL, arXiv:2509.07979); `contrastive`
is InfoNCE (arXiv:1807.03748) over the words of the same image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from probing.distillation.losses import AuxiliaryLoss
from probing.distillation.recipe import PatchAlignmentRecipe
from probing.models.word_embeddings import word_ids
from probing.utils.precision import without_autocast


@dataclass(frozen=True)
class PooledPatches:
    """Patches averaged by image and word.

    Attributes:
        vectors: (pairs, H).
        image: (pairs) index of the image.
        word: (pairs) index into `words`.
        words: (W) labels that occur.
    """

    vectors: Tensor
    image: Tensor
    word: Tensor
    words: Tensor


def pool_patches(features: Tensor, labels: Tensor) -> PooledPatches:
    """Averages features (images, patches, H) over the patches of each label (images, patches); -1 is no label."""
    words = labels[labels >= 0].unique()
    member = (labels[:, :, None] == words).to(features.dtype)
    counts = member.sum(dim=1)
    image, word = counts.nonzero(as_tuple=True)
    sums = member.transpose(1, 2) @ features  # a matmul, because scattered sums are not deterministic
    return PooledPatches(sums[image, word] / counts[image, word, None], image, word, words)


def cosine_loss(pooled: PooledPatches, vectors: Tensor) -> Tensor:
    """Sums 1 - cos(v, w) over pairs; `vectors` (W, H) belong to `pooled.words`."""
    return (1 - F.cosine_similarity(pooled.vectors, vectors[pooled.word], dim=1)).sum()


def contrastive_loss(pooled: PooledPatches, vectors: Tensor, temperature: float) -> Tensor:
    """Sums the cross-entropy of cos(v, w) / temperature over the words of the same image; one word alone adds 0."""
    cosines = F.normalize(pooled.vectors, dim=1) @ F.normalize(vectors, dim=1).T
    own = (pooled.word[:, None] == torch.arange(len(vectors), device=vectors.device)).to(cosines.dtype)
    in_image = (pooled.image[:, None] == pooled.image).to(cosines.dtype) @ own
    logits = (cosines / temperature).masked_fill(in_image == 0, -torch.inf)
    return F.cross_entropy(logits, pooled.word, reduction="sum")


def count_pairs(labels: Tensor, minimum: int) -> Tensor:
    """Counts (image, word) pairs of labels (images, patches), in images with at least `minimum` words."""
    image, _ = (labels >= 0).nonzero(as_tuple=True)
    pairs = torch.stack((image, labels[labels >= 0])).unique(dim=1)
    counts = pairs[0].bincount()
    return counts[counts >= minimum].sum()


class PatchAlignmentLoss(AuxiliaryLoss):
    """Mean over all (image, word) pairs of the global batch.

    Attributes:
        minimum: words that an image needs; a contrast needs two.
    """

    keys = ("patches",)
    ids: Tensor
    shares: Tensor

    def __init__(
        self,
        recipe: PatchAlignmentRecipe,
        tokenizer: Any,
        words: Sequence[str],
        input_embeddings: Callable[[], nn.Module],
    ) -> None:
        """Tokenizes the words.

        Args:
            recipe: loss and weight.
            tokenizer: of the LLM.
            words: labels are indices into these.
            input_embeddings: returns the LLM's input embeddings.

        Raises:
            UserError: the tokenizer has no tokens for a word.
        """
        super().__init__()
        self.temperature = recipe.temperature if recipe.loss == "contrastive" else None
        self.minimum = 1 if self.temperature is None else 2
        self.name, self.layers = f"patches.{recipe.loss}", {0}
        self.weights = {self.name: recipe.weight}
        self.input_embeddings = input_embeddings
        tokens = [torch.tensor(word_ids(tokenizer, word)) for word in words]
        shares = [torch.full((len(ids),), 1 / len(ids)) for ids in tokens]
        self.register_buffer("ids", pad_sequence(tokens, batch_first=True), persistent=False)
        self.register_buffer("shares", pad_sequence(shares, batch_first=True), persistent=False)

    @torch.no_grad()
    def word_vectors(self, words: Tensor) -> Tensor:
        """Returns the current vectors (W, H) of some words, as `probing.models.word_embeddings.word_vectors`.

        It calls the module, which may be sharded or scale its output, and does not read its table.
        """
        index = words.to(self.ids.device)
        rows = self.input_embeddings()(self.ids[index].to(words.device)).float()
        return (rows * self.shares[index].to(rows)[:, :, None]).sum(dim=1)

    def prepare(self, batches: list[dict[str, Any]], device: torch.device, world: int) -> None:
        """Replaces `patch_labels` by `patches`: labels, and the number of pairs in the global batch."""
        labelled = [batch for batch in batches if "patch_labels" in batch]
        pairs = torch.zeros((), dtype=torch.long, device=device)
        for batch in labelled:
            pairs += count_pairs(batch["patch_labels"], self.minimum).to(device)
        if world > 1:
            torch.distributed.all_reduce(pairs)
        for batch in labelled:
            batch["patches"] = {"labels": batch.pop("patch_labels"), "pairs": pairs}

    def loss(self, states: dict[int, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns `patches.cosine` or `patches.contrastive`."""
        if "patches" not in batch:
            return {}
        features, patches = states[0], batch["patches"]
        with without_autocast(features.device):
            pooled = pool_patches(features.float(), patches["labels"])
            vectors = self.word_vectors(pooled.words)
            if self.temperature is None:
                total = cosine_loss(pooled, vectors)
            else:
                total = contrastive_loss(pooled, vectors, self.temperature)
            return {self.name: total / patches["pairs"].clamp(min=1)}
