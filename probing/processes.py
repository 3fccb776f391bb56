"""The processes that a launcher started together."""

import os

import torch
from accelerate import Accelerator

from probing.errors import UserError


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
    return accelerator


def alone(verb: str) -> Accelerator:
    """The device of a command that is one process; raises UserError where several were started."""
    if started() > 1:
        raise UserError(
            f"probing {verb} runs as one process, and {started()} were started; leave out accelerate launch"
        )
    return Accelerator()
