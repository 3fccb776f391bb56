"""Numerical precision."""

import contextlib
from collections.abc import Iterator

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Disables autocast; a device without autocast, such as `meta`, needs nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Computes float32 products with TensorFloat-32 (10 bits of mantissa) on CUDA, and as always elsewhere."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
