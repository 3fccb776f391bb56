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
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

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


def backward(loss: Tensor) -> None:
    """Runs a backward pass in which checkpointed blocks are run again as in the forward pass.

    `Tensor.backward` would take the modes away for as long as it lasts, and attention would be written out.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@dataclass
class Flops:
    """Floating-point operations so far; call it for all of them.

    Attributes:
        short: in 16-bit numbers.
        long: in 32-bit and longer ones.
    """

    short: int = 0
    long: int = 0

    def __call__(self) -> int:
        """All of them."""
        return self.short + self.long


@contextlib.contextmanager
def count_flops() -> Iterator[Flops]:
    """Counts floating-point operations, backward passes included."""
    flops = Flops()

    def tallied(formula: Callable[..., int]) -> Callable[..., int]:
        def counted(*args: Any, **kwargs: Any) -> int:
            number = formula(*args, **kwargs)
            dtype = next(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            if dtype in (torch.bfloat16, torch.float16):
                flops.short += number
            else:
                flops.long += number
            return number

        counted._get_raw = True  # type: ignore[attr-defined]
        return counted

    own = {_attention: _attention_flops, _attention_backward: _attention_backward_flops}
    formulas = dict(flop_registry) | {op: shape_wrapper(formula) for op, formula in own.items()}
    with FlopCounterMode(display=False, custom_mapping={op: tallied(f) for op, f in formulas.items()}):
        yield flops


@contextlib.contextmanager
def autocast(keep: bool = True) -> Iterator[None]:
    """What `torch.autocast` in bfloat16 does on a GPU, for shapes; torch itself has none on the meta device.

    Args:
        keep: the copies of trained weights until the end, as a forward pass does. A checkpointed block that is run
            again in a backward pass keeps them only so long as it needs them.
    """
    with _Autocast(keep):
        yield


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


class _Autocast(TorchFunctionMode):
    """Rounds what goes into products, and widens what goes into sums."""

    rounded = frozenset(
        {
            F.linear, F.scaled_dot_product_attention, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.bmm, torch.mm,
            torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
        }
    )  # fmt: skip
    widened = frozenset(
        {
            F.softmax, F.log_softmax, F.layer_norm, F.group_norm, F.cross_entropy, F.nll_loss, F.smooth_l1_loss,
            F.mse_loss, F.cosine_similarity, F.normalize, torch.softmax, torch.log_softmax, torch.exp, torch.pow,
            torch.rsqrt, torch.sum, torch.cumsum, torch.norm, Tensor.softmax, Tensor.log_softmax, Tensor.exp,
            Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.sum, Tensor.cumsum, Tensor.norm,
        }
    )  # fmt: skip

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep, self.kept = keep, dict[Tensor, Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.rounded:
            args, kwargs = tree_map_only(Tensor, self._round, (args, kwargs))
        elif func in self.widened:
            args, kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
        return func(*args, **kwargs)

    def _round(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (self.keep and tensor.requires_grad and tensor.is_leaf):
            return tensor.to(torch.bfloat16)
        if tensor not in self.kept:
            self.kept[tensor] = tensor.to(torch.bfloat16)
        return self.kept[tensor]

    def __exit__(self, *error: Any) -> None:
        self.kept.clear()
        super().__exit__(*error)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


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
