"""Share of every block's attention that falls on the image, observed while the model's own kernels run.

Fused kernels return no attention, and eager ones hold T² numbers per head. Here the few rows of interest are computed
again from queries and keys, next to the fused kernel.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from analysis.alignment.metrics.base import LabelledBatch, Measure, ScoreRow, States
from probing.models import Backbone, TokenMap
from probing.models.token_map import IMAGE_KINDS

NAME = "probing_image_share"
"""The attention implementation under which transformers finds `_attend`."""
KERNEL = "sdpa"
"""The implementation that it replaces, and calls."""
QUERIES = ("last token", "tokens after the image")


@dataclass
class ImageShares:
    """Attention shares of one forward pass.

    Attributes:
        image: image positions, (B, T).
        queries: positions that are averaged over, by name, each (B, T).
        positions: of those in any sequence.
        by_layer: by layer and name of the queries: the share, and that of uniform attention, each (B).
    """

    image: Tensor
    queries: dict[str, Tensor]
    positions: Tensor
    by_layer: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, layer: str, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        """Computes the shares of one block from queries and keys, (B, heads, T, head width) each."""
        queries = {name: rows.to(query.device, non_blocking=True) for name, rows in self.queries.items()}
        positions = self.positions.to(query.device, non_blocking=True)
        rows = query[:, :, positions].float().unflatten(1, (key.shape[1], -1))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = (rows @ key.float().mT[:, :, None]).flatten(1, 2) * scale
        if mask is None:  # the kernel is causal then
            seen = torch.arange(key.shape[2], device=key.device) <= positions[:, None]
        else:
            seen = mask[:, :, positions, : key.shape[2]]
        image = self.image.to(query.device, non_blocking=True)
        attention, uniform = _softmax(logits, seen), _softmax(torch.zeros_like(logits[:, :1]), seen)
        self.by_layer[layer] = {
            name: (
                attention_share(attention, image, chosen[:, positions]),
                attention_share(uniform, image, chosen[:, positions]),
            )
            for name, chosen in queries.items()
        }


_watching: ContextVar[ImageShares | None] = ContextVar("_watching", default=None)


class ImageAttention(Measure):
    """Attention to the image of the block before each layer, and what uniform attention would give."""

    def __init__(self, model: Backbone) -> None:
        self.configs = _attention_configs(model)

    @contextlib.contextmanager
    def watch(self, tokens: TokenMap) -> Iterator[None]:
        """Observes the attention of one forward pass."""
        image, valid = tokens.mask(*IMAGE_KINDS), ~tokens.mask("padding")
        positions = torch.arange(image.shape[1], device=image.device)
        last = (positions * valid).amax(dim=1, keepdim=True)
        after = valid & ~image & (positions > (positions * image).amax(dim=1, keepdim=True))
        queries = dict(zip(QUERIES, (positions == last, after), strict=True))
        chosen = ((positions == last) | after).any(dim=0).nonzero().flatten()
        token = _watching.set(ImageShares(image, queries, chosen))
        for config in self.configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config in self.configs:
                config._attn_implementation = KERNEL
            _watching.reset(token)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields one number per image and set of queries; these do not depend on whether the states are finite."""
        shares = _watching.get()
        assert shares is not None
        for queries, (share, uniform) in shares.by_layer.get(states.name, {}).items():
            yield ScoreRow(states.key("tokens", "image_attention", queries), share, share.isfinite())
            yield ScoreRow(states.key("tokens", "image_attention", queries, "uniform"), uniform, share.isfinite())


def can_watch(model: Backbone) -> bool:
    """Whether the LLM's attention runs through transformers' interface, with the kernel that `_attend` calls."""
    return all(config is not None and config._attn_implementation == KERNEL for config in _attention_configs(model))


def _attention_configs(model: Backbone) -> list[Any]:
    return [getattr(getattr(block, "self_attn", None), "config", None) for block in model.blocks]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Calls the fused kernel, and adds the shares of its block."""
    if (shares := _watching.get()) is not None:
        shares.add(str(module.layer_idx + 1), query, key, attention_mask, kwargs.get("scaling"))
    return cast(tuple[Tensor, None], sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs))


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; a mask is bool, or added to the logits."""
    return (logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen).softmax(dim=-1)


def attention_share(attention: Tensor, image: Tensor, query: Tensor) -> Tensor:
    """Share of attention on the image: Σ_{j in image} A[h, q, j], mean over heads and chosen queries.

    The quantity of FastV (Chen et al., 2024, arXiv:2403.06764). With uniform attention it is the fraction of image
    positions among those that a query sees.

    Args:
        attention: after the softmax, (B, heads, Q, T). Rows of queries that are not chosen may be NaN.
        image: image keys, bool, (B, T).
        query: queries to average over, bool, (B, Q), at least one per sample.

    Returns:
        (B), float64.
    """
    on_image = (attention.mean(dim=1, dtype=torch.float64) @ image.double()[..., None]).squeeze(-1)
    return torch.where(query, on_image, 0).sum(dim=-1) / query.sum(dim=-1)
