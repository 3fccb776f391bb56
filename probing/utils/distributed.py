"""Processes that a launcher started: rank, world size, communication."""

import atexit
import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from probing.utils.errors import UserError

BUCKET_BYTES = 64 * 2**20
DEAD_RANK_MESSAGES = ("by peer", "Broken pipe", "Connection refused", "Timed out waiting")
"""Parts of gloo's messages if another process is gone; other backends raise `DistError`."""


def world_size() -> int:
    """Returns the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_gpu() -> bool:
    """Returns whether there is an accelerator with float64, in which sums are; Apple's MPS has none."""
    device = torch.accelerator.current_accelerator()
    return torch.accelerator.is_available() and device is not None and device.type != "mps"


def default_device() -> torch.device:
    """Returns the device on which models of this process are loaded."""
    return PartialState(cpu=not has_gpu()).device


def init_accelerator() -> Accelerator:
    """Joins the process group of the launcher.

    Raises:
        UserError: accelerate joins another number of processes than were started.
    """
    # Accelerate joins processes without GPU only on request. Otherwise each of them would act as the only one, and all
    # would write and remove the same files.
    accelerator = Accelerator(cpu=not has_gpu())
    if accelerator.num_processes != world_size():
        raise UserError(
            f"{world_size()} processes were started, and accelerate joins {accelerator.num_processes}; start one, or "
            "set ACCELERATE_USE_CPU=true"
        )
    if accelerator.num_processes > 1:
        # Threads of a group that still exists when the interpreter exits may abort it.
        atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def require_single_process(verb: str) -> Accelerator:
    """Returns the accelerator of a single-process command; raises UserError if several processes were started."""
    if world_size() > 1:
        raise UserError(
            f"probing {verb} runs as one process, and {world_size()} were started; leave out accelerate launch"
        )
    return Accelerator(cpu=not has_gpu())


@contextlib.contextmanager
def report_dead_ranks() -> Iterator[None]:
    """Raises UserError if another process of the group ended while this one waited for it."""
    try:
        yield
    except RuntimeError as error:
        dead = isinstance(error, torch.distributed.DistError) or any(m in str(error) for m in DEAD_RANK_MESSAGES)
        if world_size() == 1 or not dead:
            raise
        raise UserError(
            "another process of this run ended early (see its own messages); the same command resumes from the last "
            "saved state"
        ) from None


def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces each gradient by its sum over all processes; a missing gradient counts as zero.

    Gradients travel in buckets: each call has a latency of a millisecond or more, and probes have many small tensors.
    """
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if size > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter.grad)
        size += parameter.grad.nbytes
    for bucket in filter(None, buckets):
        total = torch.cat([grad.flatten() for grad in bucket])
        torch.distributed.all_reduce(total)
        for grad, part in zip(bucket, total.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))
