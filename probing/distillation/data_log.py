"""Log of samples that were skipped or truncated."""

import contextlib
import json
from pathlib import Path
from typing import Any

from probing.data.conversations import NOTES


class DataLog:
    """Per-process JSONL log of skipped and truncated samples; survives restarts."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"data-{rank}.jsonl"
        self.written: set[tuple[str, str]] = set()

    def take(self, batch: dict[str, Any]) -> None:
        """Removes the names of samples from a batch and logs the new ones."""
        new = {(kind, name) for kind in NOTES for name in batch.pop(kind, [])} - self.written
        if new:
            self.written |= new
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in sorted(new))

    @staticmethod
    def read(folder: Path) -> dict[str, list[str]]:
        """Returns the names that all processes logged, sorted, by kind."""
        names: dict[str, set[str]] = {kind: set() for kind in NOTES}
        for file in folder.glob("data-*.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a process that was killed
                    kind, name = json.loads(line)
                    names[kind].add(name)
        return {kind: sorted(logged) for kind, logged in names.items()}
