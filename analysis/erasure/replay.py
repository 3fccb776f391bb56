"""A forward pass that can be repeated from any layer on, with another state there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probing.models.base import FINAL, Backbone, Batch, Layer
from probing.utils.errors import UserError

SAME = 1e-2
"""Largest relative difference between states that count as the same, in 16 bits too."""


@dataclass(frozen=True)
class Replay:
    """A pass of one batch.

    Attributes:
        backbone: the model.
        states: (B, T, H) by layer, `final` among them.
        calls: what each block got besides the hidden states.
    """

    backbone: Backbone
    states: dict[Layer, Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    def record(cls, backbone: Backbone, batch: Batch, layers: Sequence[Layer]) -> "Replay":
        """Runs the pass; the states of `layers` and the final one stay in memory."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

        states: dict[Layer, Tensor] = {}
        handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in backbone.blocks]
        try:
            backbone.stream(batch, [*(layer for layer in layers if layer != FINAL), FINAL], states.__setitem__)
        finally:
            for handle in handles:
                handle.remove()
        return cls(backbone, states, calls)

    @torch.no_grad()
    def final_from(self, layer: Layer, state: Tensor) -> Tensor:
        """Computes the state after the final norm (B, T, H) from a state of a layer."""
        if layer == FINAL:
            return state
        first = int(layer)
        for block, (args, kwargs) in zip(self.backbone.blocks[first:], self.calls[first:], strict=True):
            output = block(state, *args, **kwargs)
            state = output[0] if isinstance(output, tuple) else output
        final: Tensor = self.backbone.norm(state)
        return final


def require_replay(backbone: Backbone, batch: Batch, layer: Layer) -> None:
    """Checks that a pass can be resumed from a layer, and that no token of the prompt sees the answer.

    Args:
        backbone: the model.
        batch: one image twice, with different answers.
        layer: the first to resume from.

    Raises:
        UserError: the LLM changes states between its blocks (as Qwen3-VL does), or its attention is not causal.
    """
    replay = Replay.record(backbone, batch, [layer])
    final = replay.states[FINAL]
    if _differ(replay.final_from(layer, replay.states[layer]), final):
        raise UserError(f"{backbone.name} changes states between its blocks, so erase cannot resume; use another")
    one, two = (own[shown] for own, shown in zip(final, ~batch.tokens.mask("answer", "padding"), strict=True))
    shared = min(len(one), len(two))  # a tokenizer may merge the ends of prompt and answer
    if _differ(one[:shared], two[:shared]):
        raise UserError(f"the prompt's tokens see the answer in {backbone.name}; erase needs causal attention")


def _differ(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).float().norm() > SAME * two.float().norm())
