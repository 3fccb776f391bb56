"""The processes that a launcher started together."""

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from probing.utils.errors import UserError

logger = logging.getLogger(__name__)

MESSAGE = 2**22
"""Numbers of gradients that processes exchange at once, about."""
LOST = ("by peer", "Broken pipe", "Connection refused", "Timed out waiting")
"""What gloo says where another process is gone; the other means of communication have errors of their own."""


def started() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def together() -> Accelerator:
    """The device of this process, and its place among those started with it.

    Raises:
        UserError: they cannot work together.
    """
    # Accelerate joins processes without GPU only where it is told to. Each would otherwise take itself for the only
    # one, and they would write, and clear away, the same files.
    accelerator = Accelerator(cpu=started() > 1 and not torch.accelerator.is_available())
    if accelerator.num_processes != started():
        raise UserError(
            f"{started()} processes were started, and accelerate joins {accelerator.num_processes}; start one, or set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.num_processes > 1:
        # Threads of the group that are left to the end of the interpreter may abort it, after all is done.
        atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def alone(verb: str) -> Accelerator:
    """The device of a command that is one process; raises UserError where several were started."""
    if started() > 1:
        raise UserError(
            f"probing {verb} runs as one process, and {started()} were started; leave out accelerate launch"
        )
    return Accelerator()


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Raises UserError where another process ended while this one waited for it."""
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in LOST)
        if started() == 1 or not gone:
            raise
        raise UserError(
            "another process of this run ended before its time (its own messages say why); the same command goes on "
            "from the last saved state"
        ) from None


def add_up_gradients(parameters: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Gives every process the sum of all processes' gradients, in their place.

    In messages of bounded size, whose memory is used again: fresh pages for all gradients at once cost more time than
    the exchange.
    """
    for some in _messages(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
        for parameter, own, part in zip(some, gradients, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = own.copy_(part.view_as(own))


def _messages(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters whose gradients are sent together."""
    some: list[Tensor] = []
    size = 0
    for parameter in parameters:
        some.append(parameter)
        size += parameter.numel()
        if size >= MESSAGE:
            yield some
            some, size = [], 0
    if some:
        yield some
