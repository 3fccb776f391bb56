"""Ctrl-C and SIGTERM: loops that save their state stop after the current step, everything else stops at once.

Data-loading workers ignore signals and end with the main process.
"""

import atexit
import contextlib
import multiprocessing.util  # its exit handler waits for workers; ours is registered later, so it runs first
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_WINDOW = 2.0
"""Seconds within which several signals count as one."""


class Interrupted(KeyboardInterrupt):
    """Raised when the user stops a loop; its state is saved, and the same call resumes it."""


class Interruption:
    """Records Ctrl-C or SIGTERM, so that a loop can stop between two steps; a second signal stops at once.

    Signals within `REPEAT_WINDOW` of the first are the same one: a launcher forwards to its processes the signal that a
    terminal or scheduler has already sent to all of them.
    """

    def __init__(self) -> None:
        self.requested, self.first_signal = False, 0.0

    def _record(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self.first_signal = True, now
        elif now - self.first_signal > REPEAT_WINDOW:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def watch(self) -> Iterator["Interruption"]:
        """Installs the handlers during a block; only in the main thread.

        Raises:
            Interrupted: when the block ends, if a signal arrived during it.
        """
        try:
            old = {number: signal.signal(number, self._record) for number in SIGNALS}
        except ValueError:  # not the main thread, e.g. a notebook's worker
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if self.requested:
            raise Interrupted


def raise_on_signals() -> None:
    """Makes SIGTERM raise KeyboardInterrupt, as Ctrl-C does, even if the shell set either to be ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def ignore_signals() -> None:
    """Ignores Ctrl-C and SIGTERM, in data-loading workers.

    Terminals and schedulers signal every process of a run. If a worker ended first, the main process could not finish
    its step or save its state.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Kills workers that are still alive after an error: they ignore SIGTERM, so multiprocessing would wait forever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for each killed worker
    for worker in workers:
        worker.kill()


def exit_interrupted(arguments: Sequence[str]) -> NoReturn:
    """Prints the `probing` command that resumes the work, and exits with 130."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a launcher's copy of the signal must not interrupt the exit
    if os.environ.get("RANK", "0") == "0":
        launcher = " the same launcher and" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        sys.stderr.write(f"interrupted; resume with{launcher}: {shlex.join(['probing', *arguments])}\n")
    sys.exit(130)
