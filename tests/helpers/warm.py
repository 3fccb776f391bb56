"""Starts processes as copies of one that has imported everything: imports take most of a command's time."""

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = str(Path(__file__).parents[2])
PRELOAD = (
    *(
        "probing.training.run",
        "probing.distillation.trainer",
        "analysis.evaluation.run",
        "analysis.alignment.run",
        "torch.utils.tensorboard",
    ),
    *("transformers.models.auto", "transformers.models.auto.tokenization_auto", "transformers.models.llava"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llava", "clip", "llama", "depth_anything", "dinov2")),
    *("transformers.models.llava.processing_llava", "transformers.models.clip.image_processing_clip"),
    *("transformers.models.vit.image_processing_vit", "torch._dynamo", "safetensors.numpy"),
)


def context() -> ForkServerContext:
    """Returns the context that starts copies; the first process imports."""
    if ROOT not in sys.path:
        sys.path.insert(0, ROOT)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(PRELOAD))
    return server


def detach(log: Path) -> None:
    """Makes this process the leader of its own group, with one thread, and its output in a file."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)  # threads that wait for each other spin on a busy machine
    gc.freeze()  # garbage collection skips what was imported


def launch(arguments: list[str], log: Path, patch: Callable[[], None] | None = None) -> list[BaseProcess]:
    """Starts `probing` in two processes that join each other, as a launcher does; `LOG.0` and `LOG.1` are their output.

    Args:
        arguments: of `probing`.
        log: stem of the files with the output.
        patch: called first in both processes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = context()
    processes: list[BaseProcess] = [
        server.Process(target=_member, args=(arguments, log.with_suffix(f".{rank}"), rank, port, patch))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def _member(arguments: list[str], log: Path, rank: int, port: int, patch: Callable[[], None] | None) -> None:
    from probing.cli import main

    detach(log)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    if patch:
        patch()
    sys.argv = ["probing", *arguments]
    main()


def finish(processes: list[BaseProcess], log: Path, seconds: float = 120) -> tuple[list[int | None], str]:
    """Waits for the processes; returns their exit codes and their output."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, "".join(log.with_suffix(f".{rank}").read_text() for rank in range(len(processes)))
