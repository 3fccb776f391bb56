"""Progress of long loops: a bar on a terminal and in a notebook, log lines elsewhere and in child processes."""

import logging
import multiprocessing
import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0
"""Seconds between log lines."""


class Progress:
    """Shows steps done, rate and time left; a context manager."""

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "steps", show: bool = True) -> None:
        self.title, self.total, self.done, self.unit, self.show = title, total, done, unit, show
        self.initial = done
        self.started = self.last_log = time.monotonic()
        watched = show and (sys.stderr.isatty() or _in_notebook()) and multiprocessing.parent_process() is None
        self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True) if watched else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the bar and leaves it on the terminal."""
        if self.bar is not None:
            self.bar.close()

    def advance(self, note: str = "") -> None:
        """Counts one step."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if self.show and (now - self.last_log > LOG_SECONDS or self.done == self.total):
            rate = (self.done - self.initial) / max(now - self.started, 1e-9)
            left = (self.total - self.done) / rate
            line = "%s: %d/%d %s, %.2f a second, %.0f s left%s"
            logger.info(line, self.title, self.done, self.total, self.unit, rate, left, f", {note}" if note else "")
            self.last_log = now


def _in_notebook() -> bool:
    """Returns whether a Jupyter kernel runs this process, by the test of `tqdm.auto`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
