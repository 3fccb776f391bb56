"""The files of a training state: one of the main process or, if processes train different layers, one of each."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from probing.training.state import TrainerState
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, disk_errors, reading

logger = logging.getLogger(__name__)


def _load(file: Path) -> Any:
    # To the CPU first: without accelerator, processes have devices such as cpu:0, to which torch cannot load.
    return torch.load(file, map_location=lambda storage, _: storage, weights_only=True)


@dataclass(frozen=True)
class StateFiles:
    """Saves and restores the training state on one set of weights.

    Attributes:
        folder: of the files.
        accelerator: the processes.
        parts: whether each process saves its own part.
    """

    folder: Path
    accelerator: Accelerator
    parts: bool

    def save(self, state: TrainerState) -> None:
        """Saves atomically; parts of earlier steps are removed when every process has saved."""
        file = self._file(state.step)
        if self.parts or self.accelerator.is_main_process:
            # Through a Python file: torch's own would report a full disk as a stream error without name.
            with disk_errors(self.folder), atomic_file(file) as temporary, temporary.open("wb") as stream:
                torch.save(state.dump(), stream)
            logger.info("saved the training state at step %d", state.step)
        self.accelerator.wait_for_everyone()
        for old in self._own_parts().values() if self.parts else ():
            if old != file:
                old.unlink(missing_ok=True)  # the main process may be removing the folder

    def restore(self, state: TrainerState) -> None:
        """Loads the newest state that all processes have, if there is one.

        Raises:
            UserError: another number of processes, or another `fit.spread`, saved it; or it is broken, or of another
                training.
        """
        file = self._newest()
        if file is None:
            return
        with reading(file, f"remove {self.folder} to train from the start"):
            state.restore(_load(file))
        if not self.parts and not self.accelerator.is_main_process:  # the main process has the sums of all
            state.ridge.clear()
            state.prequential.errors.clear()
        logger.info("resuming from step %d", state.step)

    def all_parts(self, step: int) -> Iterator[dict[str, Any]]:
        """Yields the parts of all processes; a killed process may have left one of an earlier step."""
        return map(_load, sorted(self.folder.glob(f"state_*.{step}.pt")))

    def remove(self) -> None:
        """Removes the files of all processes, when the probes are saved."""
        for file in self.folder.glob("state*.pt"):
            file.unlink()

    def _file(self, step: int) -> Path:
        if not self.parts:
            return self.folder / "state.pt"
        return self.folder / f"state_{self.accelerator.process_index}_of_{self.accelerator.num_processes}.{step}.pt"

    def _own_parts(self) -> dict[int, Path]:
        """Returns the saved parts of this process, by step."""
        files = self.folder.glob(self._file(0).name.replace(".0.pt", ".*.pt"))
        return {int(file.suffixes[0][1:]): file for file in files}

    def _newest(self) -> Path | None:
        kinds = {re.sub(r"\d+_of", "_of", file.name.split(".")[0]) for file in self.folder.glob("state*.pt")}
        expected = re.sub(r"\d+_of", "_of", self._file(0).name.split(".")[0])
        if kinds - {expected}:
            raise UserError(
                f"{self.folder} was saved by another number of processes, or with another fit.spread; use the same, or "
                "remove it to train from the start"
            )
        if not self.parts:
            return self._file(0) if self._file(0).exists() else None
        steps = set.intersection(*gather_object([set(self._own_parts())]))
        return self._file(max(steps)) if steps else None
