"""What a stage notes about its samples while it goes on."""

import contextlib
import json
from pathlib import Path

from probing.data.conversations import NOTES


class Notes:
    """What batches told about their samples, on disk: it outlives an interruption, and every process writes its own."""

    def __init__(self, folder: Path, process: int) -> None:
        self.file = folder / f"notes-{process}.jsonl"
        self.written: set[tuple[str, str]] = set()

    def add(self, kind: str, names: list[str]) -> None:
        """Writes down the names that are new."""
        new = {(kind, name) for name in names} - self.written
        if new:
            self.written |= new
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(note) + "\n" for note in sorted(new))

    @staticmethod
    def read(folder: Path) -> dict[str, list[str]]:
        """All names of all processes, sorted, by kind."""
        found: dict[str, set[str]] = {kind: set() for kind in NOTES}
        for file in folder.glob("notes-*.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a process that was killed
                    kind, name = json.loads(line)
                    found[kind].add(name)
        return {kind: sorted(names) for kind, names in found.items()}
