"""FLOPs and activations of models, from shapes and configurations alone: no weights are read.

FLOPs are within 15 % of what `FlopCounterMode` counts in a real step.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from probing.models.image_tokens import CANNOT_RUN
from probing.probes.resampler import Resampler, ResamplerConfig

META = torch.device("meta")


class UnknownCostError(Exception):
    """The architecture has no closed form here."""


@dataclass(frozen=True)
class ForwardCost:
    """One forward pass.

    Attributes:
        flops: operations.
        largest: bytes of the largest output of a module.
        outputs: bytes of the outputs of all modules without children, about what a backward pass keeps.
    """

    flops: int
    largest: int = 0
    outputs: int = 0


def trace(function: Callable[..., Any], **inputs: Any) -> ForwardCost:
    """Runs a model on the meta device, where tensors have shapes and no values."""
    largest, outputs = 0, 0

    def note(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest, outputs
        if isinstance(output, Tensor) and not any(True for _ in module.children()):
            largest, outputs = max(largest, output.nbytes), outputs + output.nbytes

    handle = register_module_forward_hook(note)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(**inputs)
    finally:
        handle.remove()
    return ForwardCost(counter.get_total_flops(), largest, outputs)


def image_cost(core: Any, inputs: dict[str, Tensor]) -> ForwardCost:
    """Costs vision tower and projector; where they need values, 2 x parameters x patches of the tower.

    Args:
        core: a LLaVA or the like of transformers, on the meta device.
        inputs: a batch of one image; integers keep their values, because sizes and grids are read from them.

    Raises:
        UnknownCostError: there is no convolution that tells the number of patches.
    """
    if "pixel_values" not in inputs:
        return ForwardCost(0)
    try:
        names = inspect.signature(core.get_image_features).parameters
        known = {n: t.to(META) if t.is_floating_point() else t for n, t in inputs.items() if n in names}
        return trace(core.get_image_features, **known)
    except CANNOT_RUN:
        encoder = getattr(core, "get_encoder", lambda _: core)("image")
        patch = next((p for p in encoder.parameters() if p.ndim > 3), None)
        if patch is None:
            raise UnknownCostError(f"{type(encoder).__name__}, its vision tower, needs weights to run") from None
        patches = inputs["pixel_values"].numel() // patch[0].numel()
        weights = sum(p.numel() for p in encoder.parameters())
        return ForwardCost(2 * weights * patches, 4 * patches * widest(encoder))


def decoder_flops(blocks: nn.Module, tokens: int, hidden_size: int) -> tuple[int, int]:
    """Counts matmuls with weights, 2 x parameters x T, and attention, 4 x layers x T^2 x H, of a forward pass.

    Raises:
        UnknownCostError: not all parameters take part in every token.
    """
    if any(p.ndim > 2 for p in blocks.parameters()):
        raise UnknownCostError("its LLM has experts or convolutions")
    layers = sum(1 for _ in blocks.children())
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    return 2 * weights * tokens, 4 * layers * tokens**2 * hidden_size


def resampler_flops(config: ResamplerConfig, tokens: int, states_need_grad: bool) -> int:
    """Counts forward and backward of a probe, or an embedding predictor, on the states of one image."""
    with META:
        resampler, states = Resampler(config), torch.zeros(1, tokens, config.key_width, requires_grad=states_need_grad)
    with FlopCounterMode(display=False) as counter:
        resampler(states).sum().backward()
    return counter.get_total_flops()


def widest(model: nn.Module) -> int:
    """Returns the largest output width of a linear layer."""
    return max(p.shape[0] for p in model.parameters() if p.ndim == 2)


def weight_bytes(model: nn.Module) -> int:
    """Counts bytes of all parameters."""
    return sum(p.nbytes for p in model.parameters())
