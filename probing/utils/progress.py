"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY = 30.0
"""Seconds between plain lines."""


class Progress:
    """Counts steps, shows rate and time left; use as a context manager."""

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "steps", show: bool = True) -> None:
        self.what, self.total, self.done, self.unit, self.show = what, total, done, unit, show
        self.first = done
        self.started = self.last_line = time.monotonic()
        terminal = show and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()

    def advance(self, note: str = "") -> None:
        """One step is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if self.show and (now - self.last_line > LINE_EVERY or self.done == self.total):
            rate = (self.done - self.first) / max(now - self.started, 1e-9)
            left = (self.total - self.done) / rate
            line = "%s: %d/%d %s, %.2f a second, %.0f s left%s"
            logger.info(line, self.what, self.done, self.total, self.unit, rate, left, f", {note}" if note else "")
            self.last_line = now
