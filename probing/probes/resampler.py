"""The single-layer Perceiver resampler: a probe, or an embedding predictor inside distillation.

The architecture is that of OLA-VLM's probes (arXiv:2412.09585, sec. 3 and Fig. 4), with the tensor names of its
published checkpoints.
"""

from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of one resampler.

    Attributes:
        key_width: width H of the hidden states.
        queries: number of latent queries, which is the number of target tokens.
        width: inner width D; in the paper the width of the target.
        output_width: width of the target.
        heads: attention heads.
        dim_head: width of one head.
        ff_mult: hidden width of the feed-forward block, divided by D.
    """

    key_width: int
    queries: int
    width: int
    output_width: int
    heads: int = 4
    dim_head: int = 32
    ff_mult: int = 1

    def to_dict(self) -> dict[str, int]:
        """Returns plain values, for `config.json`."""
        return asdict(self)


class PerceiverAttention(nn.Module):
    """Latents attend to the keys and to themselves."""

    def __init__(self, width: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.dim_head = dim_head
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Attends from latents to keys and latents.

        Args:
            x: keys (B, T, D).
            latents: (1, Nq, D), shared by all samples, so that their projections are computed once.
            mask: (B, T), True for keys that may be attended to.

        Returns:
            (B, Nq, D).
        """
        batch, queries = len(x), latents.shape[1]
        latents = self.norm2(latents)
        q = self._heads(self.to_q(latents)).expand(batch, -1, -1, -1)
        keys, latent_keys = (self._heads(self.to_kv(tokens)) for tokens in (self.norm1(x), latents))
        k, v = torch.cat((keys, latent_keys.expand(batch, -1, -1, -1)), dim=2).chunk(2, dim=1)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(batch, queries)), dim=1)[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        """Splits heads: (B, T, n * heads * dim_head) → (B, n * heads, T, dim_head)."""
        return tokens.unflatten(-1, (-1, self.dim_head)).transpose(1, 2)


class Resampler(nn.Module):
    """Maps hidden states (B, T, H) to a target (B, Nq, O)."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.latents = nn.Parameter(torch.randn(1, config.queries, width) / width**0.5)
        self.proj_in = nn.Linear(config.key_width, width)
        feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.ff_mult * width, bias=False),
            nn.GELU(),
            nn.Linear(config.ff_mult * width, width, bias=False),
        )
        attention = PerceiverAttention(width, config.heads, config.dim_head)
        self.layers = nn.ModuleList([nn.ModuleList([attention, feed_forward])])
        self.proj_out = nn.Linear(width, config.output_width)
        self.norm_out = nn.LayerNorm(config.output_width)

    def forward(self, states: Tensor, mask: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """Predicts the target.

        Args:
            states: hidden states of one layer, (B, T, H), in the dtype of the probe.
            mask: (B, T), True where a position may be attended to; None uses every position.
            queries: (Nq, H), which replace the latents in an embedding predictor; they share `proj_in` with the states.

        Returns:
            The prediction (B, Nq, O), after a LayerNorm.
        """
        latents = self.latents if queries is None else self.proj_in(queries)[None]
        x = self.proj_in(states)
        block = cast(nn.ModuleList, self.layers[0])
        latents = latents + block[0](x, latents, mask)
        latents = latents + block[1](latents)
        return self.norm_out(self.proj_out(latents))
