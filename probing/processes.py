"""The processes that a launcher started together."""

import atexit
import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from probing.errors import UserError

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
