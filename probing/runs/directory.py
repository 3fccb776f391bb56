"""The directory of a run: recipe, probes, manifest, scores, results, report.

Files are written atomically and the manifest last, so a run without manifest is unfinished.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from probing.recipe import ProbeRunRecipe, model_name, read_yaml, validate
from probing.utils.errors import UserError
from probing.utils.files import (
    RESTORE_ADVICE,
    read_json,
    reading,
    remove_temporary_files,
    temporary_files,
)

if TYPE_CHECKING:
    import torch

SPEED_ONLY = ("fit.workers", "fit.save_minutes", "fit.spread", "fit.report_to", "data.target_cache")
"""Fields that a resumed run may change, because they do not affect any number."""


def is_alignment(path: Path) -> bool:
    """Returns whether a folder is a finished run of `probing align`, or holds such runs."""
    return _kind(path) == "alignment"


def is_benchmark(path: Path) -> bool:
    """Returns whether a folder is a run of `probing bench`, finished or not, or holds such runs."""
    recipe = (runs_in(path) or [path])[0] / "recipe.yaml"
    return _kind(path) == "benchmark" or (recipe.is_file() and "benchmark" in read_yaml(recipe))


def _kind(path: Path) -> Any:
    try:
        manifest = json.loads(((runs_in(path) or [path])[0] / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest.get("kind") if isinstance(manifest, dict) else None


@dataclass(frozen=True)
class Run:
    """A run directory with its resolved recipe."""

    path: Path
    recipe: ProbeRunRecipe

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}: {text}' for name, text in self._facts().items())})"

    def _repr_html_(self) -> str:
        from probing.utils.notebook import table

        return table("Run", [*self._facts().items()])

    def _facts(self) -> dict[str, str]:
        """Describes the run, from its recipe."""
        recipe, evaluated = self.recipe, (self.path / "results.csv").is_file()
        return {
            "path": str(self.path),
            "state": "not finished" if not self.finished else "evaluated" if evaluated else "trained, not evaluated",
            "checkpoint": model_name(recipe.backbone.checkpoint),
            "teachers": ", ".join(recipe.teachers),
            "layers": recipe.layers,
            "controls": ", ".join(recipe.controls) or "none",
            "training": f"{recipe.fit.epochs} epochs, seeds {', '.join(map(str, recipe.fit.seeds))}",
        }

    def remove_temporary_files(self, idle: float = 0.0) -> None:
        """Removes temporary files of killed processes that have not changed for `idle` seconds."""
        remove_temporary_files(temporary_files(self.path), idle)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens a finished run.

        Raises:
            UserError: there is no run, or its training is unfinished.
        """
        saved = path / "recipe.yaml"
        if is_alignment(path):
            raise UserError(f"{path} is a run of probing align, which has no probes; its page: probing report {path}")
        if is_benchmark(path):
            raise UserError(f"{path} is a run of probing bench, which has no probes; its page: probing report {path}")
        if not saved.exists():
            raise UserError(
                f"no run at {path}: it has no recipe.yaml; make one with: probing train --checkpoint … --data … "
                f"--out {path}"
            )
        recipe = validate(ProbeRunRecipe, read_yaml(saved), str(saved))
        run = cls(path, recipe)
        if not run.finished:
            raise UserError(
                f"the training of {path} has not finished; resume with: probing train --recipe {saved} --out {path}"
            )
        return run

    @property
    def finished(self) -> bool:
        """Whether training is finished."""
        return (self.path / "manifest.json").exists()

    @property
    def manifest(self) -> dict[str, Any]:
        """Reads the manifest; raises UserError if it is unreadable."""
        return read_json(self.path / "manifest.json", RESTORE_ADVICE)

    def probes(self, control: str) -> Path:
        """Returns the folder of the resamplers of a control (`none`, `shuffled`, `random`)."""
        return self.path / ("probes" if control == "none" else f"controls/{control}/probes")

    def ridge(self, control: str) -> Path:
        """Returns the folder of the ridge readouts of a control (`none`, `random`)."""
        return self.path / ("ridge" if control == "none" else f"controls/{control}/ridge")

    def errors(self, weights: str) -> Path:
        """Returns the file of errors on images before probes were trained on them (`none`, `random`)."""
        return (
            self.path
            / ("prequential" if weights == "none" else f"controls/{weights}/prequential")
            / "errors.safetensors"
        )

    @property
    def means(self) -> Path:
        """File with the mean targets of the training split."""
        return self.path / "mean_targets.safetensors"

    def mean_targets(self, device: "torch.device") -> dict[str, "torch.Tensor"]:
        """Reads the mean target (N, D) of each teacher over the training split; raises UserError if unreadable."""
        from safetensors.torch import load_file

        with reading(self.means, RESTORE_ADVICE):
            return load_file(self.means, device=str(device))


@dataclass(frozen=True)
class FinishedAlignment:
    """The directory of a finished run of `probing align`."""

    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """Reads the manifest; raises UserError if it is unreadable."""
        return read_json(self.path / "manifest.json", RESTORE_ADVICE)

    @property
    def settings(self) -> dict[str, Any]:
        """Recipe fields that affect its numbers and are not in the manifest; raises UserError if unreadable."""
        saved = self.path / "recipe.yaml"
        with reading(saved, RESTORE_ADVICE):
            recipe = read_yaml(saved)
            return {name: recipe[name] for name in ("layers", "coverage", "sample")}


def runs_in(path: Path) -> list[Path]:
    """Lists the runs in a folder that is not a run itself: those of one checkpoint trained with several seeds."""
    if (path / "recipe.yaml").exists() or not path.is_dir():
        return []
    return sorted(folder for folder in path.iterdir() if (folder / "recipe.yaml").exists())
