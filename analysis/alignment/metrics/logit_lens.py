"""The logit lens: output embeddings applied to patch states of any layer."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from analysis.alignment.context import AlignmentContext
from analysis.alignment.metrics.base import LabelledBatch, Measure, ScoreRow, States
from analysis.alignment.metrics.word_match import label_orders, match_rows, match_scores
from probing.models import FINAL, Backbone
from probing.models.word_embeddings import word_ids

NORMED, BARE = "final norm", "no norm"
"""The two lenses: with and without the final norm before the output embeddings."""
PATCHES = 32
"""Random patches of each image on which the entropy over the whole vocabulary is computed."""


def lens_inputs(model: Backbone, states: States) -> Iterator[tuple[str, Tensor]]:
    """Yields lens and input of the output embeddings; states after the final norm are normed already."""
    values = states.values.to(cast(Any, model.head).weight.dtype)
    # norm.forward, not norm(): the forward hook that delivers the final state must not run
    yield NORMED, values if states.name == FINAL else model.norm.forward(values).to(values.device)
    if states.name != FINAL:
        yield BARE, values


class LensEntropy(Measure):
    """Entropy of the next token, in nats."""

    def __init__(self, context: AlignmentContext) -> None:
        self.model, self.patches = context.model, context.patch_order[:PATCHES]
        config = getattr(self.model.core, "config", None)
        self.softcap = config and getattr(config.get_text_config(), "final_logit_softcapping", None)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields one number per image and lens."""
        for lens, values in lens_inputs(self.model, states):
            logits = cast(Any, self.model.head)(values[:, self.patches]).float()
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean(dim=1)
            yield ScoreRow(states.key("words", "lens_entropy", lens), entropy, states.finite)


class LensMatch(Measure):
    """Retrieval and mIoU of the labels' logits."""

    def __init__(self, context: AlignmentContext) -> None:
        self.model = context.model
        words = [word_ids(context.tokenizer, name) for name in context.annotate.words]
        self.ids = torch.tensor(sorted({token for word in words for token in word}), device=self.model.device)
        index = {int(token): row for row, token in enumerate(self.ids)}
        self.rows = [torch.tensor([index[token] for token in word], device=self.model.device) for word in words]
        self.orders = label_orders(len(words)).to(self.model.device)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields the scores of each lens, and those of permuted labels."""
        for lens, values in lens_inputs(self.model, states):
            for metric, scores in match_scores(self._label_logits(values), states, batch.patches, self.orders):
                if metric != "cosine":  # logits are not cosines
                    yield from match_rows(states, f"lens_{metric}", lens, scores)

    def _label_logits(self, values: Tensor) -> Tensor:
        """Logit of every label, the largest of its tokens', (B, P, K)."""
        head = cast(Any, self.model.head)
        logits = values @ head.weight[self.ids.to(head.weight.device)].to(values).T
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias[self.ids.to(head.bias.device)].to(values)
        return torch.stack([logits[..., rows].amax(dim=-1) for rows in self.rows], dim=-1).float()
