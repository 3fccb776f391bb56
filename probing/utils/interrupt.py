"""Ctrl-C and SIGTERM: loops that save their state end after the current step, everything else at once.

Data-loading workers leave signals to the main process and end with it.
"""

import atexit
import contextlib
import multiprocessing.util  # registers an exit handler that waits for workers; ours must come later, to run earlier
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MOMENT = 2.0
"""Seconds within which two signals count as one."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a loop; its state is saved, and the same call resumes it."""


class Interruption:
    """Notes Ctrl-C or SIGTERM, so that a loop can stop between two steps; a second one stops at once.

    Signals within a moment of the first count as the same one: a launcher passes on to its processes what a terminal or
    a scheduler has sent to all of them already.
    """

    def __init__(self) -> None:
        self.asked, self.first = False, 0.0

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self.first = True, now
        elif now - self.first > MOMENT:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def watch(self) -> Iterator["Interruption"]:
        """Installs the handlers for the duration of a block (in the main thread only).

        Raises:
            Interrupted: on leaving the block, if a signal came that the block did not act on.
        """
        try:
            old = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # not the main thread: a notebook's worker, say
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if self.asked:
            raise Interrupted


def raise_on_signals() -> None:
    """Makes SIGTERM raise KeyboardInterrupt, as Ctrl-C does, even where the shell set either to be ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def ignore_signals() -> None:
    """Leaves Ctrl-C and SIGTERM to the main process; for data-loading workers.

    Terminals and schedulers signal every process of a run. A worker that ended on its own would break the step that the
    main process is finishing, or the state that it is saving.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Kills workers that an error left alive: they ignore SIGTERM, and multiprocessing would wait for them for ever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for every worker that is killed
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
