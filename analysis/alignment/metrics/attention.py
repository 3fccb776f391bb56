"""How much of every block's attention falls on the image, seen while the model's own kernels run.

Fused kernels give no attention away, and kernels that do hold T² numbers for every head. Here the few rows that are
asked for are computed again from queries and keys, beside the fused kernel.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from probing.models import Backbone, TokenMap
from probing.models.token_map import IMAGE_KINDS

NAME = "probing_image_share"
"""The attention implementation under which transformers finds `_attend`."""
KERNEL = "sdpa"
"""The implementation that it stands in for, and calls."""
QUERIES = ("last token", "tokens after the image")


@dataclass
class ImageShares:
    """What one forward pass showed.

    Attributes:
        image: which positions are image, (B, T).
        queries: which positions are averaged over, by name, each (B, T).
        found: by number of the block, from 1, and name of the queries: the share, and what it would be if attention
            were uniform, each (B).
    """

    image: Tensor
    queries: dict[str, Tensor]
    found: dict[int, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)


_watching: ContextVar[ImageShares | None] = ContextVar("_watching", default=None)


def can_watch(backbone: Backbone) -> bool:
    """Whether the LLM's attention runs through transformers' interface, with the kernel that rows can be added to."""
    configs = [getattr(getattr(block, "self_attn", None), "config", None) for block in backbone.blocks]
    return all(config is not None and config._attn_implementation == KERNEL for config in configs)


@contextlib.contextmanager
def image_shares(backbone: Backbone, tokens: TokenMap) -> Iterator[ImageShares]:
    """Watches the attention of one forward pass inside the `with` block.

    Args:
        backbone: one for which `can_watch` is true.
        tokens: of the batch.
    """
    image = tokens.mask(*IMAGE_KINDS)
    there = ~tokens.mask("padding")
    places = torch.arange(image.shape[1], device=image.device)
    last = (places * there).amax(dim=1, keepdim=True)
    after = there & ~image & (places > (places * image).amax(dim=1, keepdim=True))
    shares = ImageShares(image, dict(zip(QUERIES, (places == last, after), strict=True)))
    configs = {id(config): config for config in (_attention(block).config for block in backbone.blocks)}.values()
    token = _watching.set(shares)
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield shares
    finally:
        for config in configs:
            config._attn_implementation = KERNEL
        _watching.reset(token)


def _attention(block: nn.Module) -> Any:
    return block.self_attn


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The fused kernel, with the image's shares noted beside it."""
    shares = _watching.get()
    if shares is not None:
        with torch.no_grad():
            _note(shares, module, query, key, attention_mask, kwargs.get("scaling"))
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out


def _note(
    shares: ImageShares, module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
) -> None:
    """Computes the rows of the chosen queries: (B, heads, T, head width) each, and a mask that is True where seen."""
    asked = {name: rows.to(query.device) for name, rows in shares.queries.items()}
    columns = torch.stack(list(asked.values())).flatten(0, 1).any(dim=0)
    places = columns.nonzero().flatten()
    groups = query.shape[1] // key.shape[1]
    rows = query[:, :, places].float().unflatten(1, (key.shape[1], groups))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (rows @ key.float().mT[:, :, None]).flatten(1, 2) * scale
    if mask is None:  # the kernel is causal then
        seen = torch.arange(key.shape[2], device=key.device) <= places[:, None]
    else:
        seen = mask[:, :, places, : key.shape[2]]
    image = shares.image.to(query.device)
    weights = _softmax(logits, seen), _softmax(torch.zeros_like(logits[:, :1]), seen)
    shares.found[module.layer_idx + 1] = {
        name: (attention_share(weights[0], image, rows[:, places]), attention_share(weights[1], image, rows[:, places]))
        for name, rows in asked.items()
    }


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; a mask is bool, or added to the logits."""
    return (logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen).softmax(dim=-1)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_share(attention: Tensor, image: Tensor, query: Tensor) -> Tensor:
    """Share of the attention that falls on the image: Σ_{j in image} A[h, q, j], mean over heads and chosen queries.

    The quantity of FastV (Chen et al., 2024, arXiv:2403.06764), with the queries of the caller. Where
    attention is uniform it is the share of image positions among those that a query sees: that is its chance.

    Args:
        attention: after the softmax, (heads, Q, T) or (B, heads, Q, T), queries before keys.
        image: which keys are image, bool, (T), or (B, T) where there is a batch.
        query: which queries to average over, bool, (Q) or (B, Q). Rows of other queries are not used, and may be NaN.

    Returns:
        float64, () without a batch and (B) with one.

    Raises:
        ValueError: shapes do not fit, a mask is not bool, or a sample has no query.
    """
    if attention.ndim not in (3, 4):
        raise ValueError(f"attention is (heads, Q, T) or (B, heads, Q, T), not {tuple(attention.shape)}")
    batch = attention.shape[:-3]
    for name, mask, size in (("keys", image, attention.shape[-1]), ("queries", query, attention.shape[-2])):
        if mask.dtype != torch.bool or mask.shape not in ((*batch, size), (size,)):
            raise ValueError(f"the mask of {name} is bool {(*batch, size)}, not {mask.dtype} {tuple(mask.shape)}")
    image, query = image.expand(*batch, attention.shape[-1]), query.expand(*batch, attention.shape[-2])
    if not query.any(dim=-1).all():
        raise ValueError("a sample has no query to average over")
    on_image = attention.mean(dim=-3, dtype=torch.float64) @ image.double()[..., None]
    return torch.where(query, on_image.squeeze(-1), 0).sum(dim=-1) / query.sum(dim=-1)
