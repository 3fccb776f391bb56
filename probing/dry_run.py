"""Running code without its numbers: floating-point tensors are mere shapes, and what they would take is counted.

Models that do not fit this machine, or whose weights are not even there, run on the meta device. Integers and masks
stay real, because what a multimodal LLM does depends on them: where the image tokens are, how many, which are padding.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Usage:
    """What a dry run took so far.

    Attributes:
        bytes: of all floating-point tensors that are alive.
        peak: the most that were alive at once, in bytes.
    """

    bytes: int = 0
    peak: int = 0


@contextlib.contextmanager
def dry_run() -> Iterator[Usage]:
    """Within it, whatever is put on the meta device can be run, and is counted.

    Attention is counted as fused kernels do it, without the matrix of weights, unless a model computes it by itself.
    """
    usage = Usage()
    with _RealIntegers(usage), _FusedAttention():
        yield usage


@contextlib.contextmanager
def count_flops() -> Iterator[Callable[[], int]]:
    """Counts floating-point operations, backward passes included; call what it yields for their number."""
    counter = FlopCounterMode(
        display=False,
        custom_mapping={_attention: _attention_flops, _attention_backward: _attention_backward_flops},
    )
    with counter:
        yield counter.get_total_flops


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Both products of attention, from shapes (B, heads, T, width)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """The weights anew, and two products for each of forward's two."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch would write attention out, with all its weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device == META:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    output: Tensor = _attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


class _RealIntegers(TorchDispatchMode):
    """Keeps integers and booleans off the meta device; everything else that meets a meta tensor becomes one."""

    def __init__(self, usage: Usage) -> None:
        super().__init__()
        self.usage, self.sizes = usage, dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shapes = any(tensor.device == META for tensor in tensors)
        if not shapes and kwargs.get("device") == META:
            dtype = (kwargs.get("dtype") or tensors[0].dtype) if tensors else func(*args, **kwargs).dtype
            shapes = dtype.is_floating_point
            if not shapes:
                kwargs["device"] = torch.device("cpu")
        if func is torch.ops.aten.index.Tensor and shapes:
            args = (args[0], _numbers(args[1]))  # how many are chosen is only known from a real mask
        if shapes:
            args, kwargs = tree_map_only(Tensor, _shape_of, (args, kwargs))
        output = func(*args, **kwargs)
        tree_map_only(Tensor, self._count, output)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device != META or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.usage.bytes += storage.nbytes()
        self.usage.peak = max(self.usage.peak, self.usage.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.usage.bytes -= self.sizes.pop(key)


def _numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return found


def _shape_of(tensor: Tensor) -> Tensor:
    if tensor.device == META:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)
