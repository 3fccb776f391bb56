"""A run is a directory: recipe, probes, manifest, scores, results, report.

Everything is written beside its place and renamed into it, and the manifest comes last: a run without manifest is
unfinished, a file that exists is whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from probing.recipe import ProbeRunRecipe, dump_recipe, read_yaml, validate
from probing.utils.errors import UserError
from probing.utils.files import LOST, disk_errors, left_overs, read_json, reading, remove_left_overs, write_text

if TYPE_CHECKING:
    import torch

SPEED_ONLY = ("fit.workers", "fit.save_minutes", "fit.spread", "fit.report_to", "data.target_cache")
"""Fields that a resumed run may change: they do not move a number."""


def is_alignment(path: Path) -> bool:
    """Whether a folder is a finished run of `probing align`, or a folder of them."""
    return _kind(path) == "alignment"


def is_benchmark(path: Path) -> bool:
    """Whether a folder is a run of `probing bench`, finished or not, or a folder of them."""
    recipe = (members(path) or [path])[0] / "recipe.yaml"
    return _kind(path) == "benchmark" or (recipe.is_file() and "benchmark" in read_yaml(recipe))


def _kind(path: Path) -> Any:
    try:
        manifest = json.loads(((members(path) or [path])[0] / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest.get("kind") if isinstance(manifest, dict) else None


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: the directory.
        recipe: its resolved recipe.
    """

    path: Path
    recipe: ProbeRunRecipe

    @staticmethod
    def is_begun(path: Path, recipe: ProbeRunRecipe) -> bool:
        """Whether a folder holds this run already; writes nothing.

        Raises:
            UserError: the folder holds another run, or something else.
        """
        saved = path / "recipe.yaml"
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another --out")
        if not saved.exists():
            if path.exists() and any(p for p in path.iterdir() if not p.name.startswith(".")):
                raise UserError(f"{path} is not empty and holds no run; choose another --out")
            return False
        difference = _first_difference(read_yaml(saved), yaml.safe_load(dump_recipe(recipe)))
        if difference:
            raise UserError(f"{path} holds another run ({difference}); choose another --out, or remove it")
        return True

    @classmethod
    def create(cls, path: Path, recipe: ProbeRunRecipe) -> "Run":
        """Starts a run, or takes up an unfinished one with the same recipe.

        Raises:
            UserError: the folder holds another run, or something else.
        """
        if not cls.is_begun(path, recipe):
            with disk_errors(path):
                write_text(path / "recipe.yaml", dump_recipe(recipe))
        return cls(path, recipe)

    def remove_left_overs(self, idle: float = 0.0) -> None:
        """Removes what a killed process was writing.

        Args:
            idle: only what nobody has touched for so many seconds: where other processes may be writing.
        """
        remove_left_overs(left_overs(self.path), idle)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Opens a finished run.

        Raises:
            UserError: there is no run, or its training has not finished.
        """
        saved = path / "recipe.yaml"
        if is_alignment(path):
            raise UserError(f"{path} is a run of probing align, which has no probes; its page: probing report {path}")
        if is_benchmark(path):
            raise UserError(f"{path} is a run of probing bench, which has no probes; its page: probing report {path}")
        if not saved.exists():
            raise UserError(f"no run at {path} (it has no recipe.yaml); make one with: probing train --out {path}")
        recipe = validate(ProbeRunRecipe, read_yaml(saved), str(saved))
        run = cls(path, recipe)
        if not run.finished:
            raise UserError(
                f"the training of {path} has not finished; go on with: probing train --recipe {saved} --out {path}"
            )
        return run

    @property
    def finished(self) -> bool:
        """Whether training is over."""
        return (self.path / "manifest.json").exists()

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made of; raises UserError where it cannot be read."""
        return read_json(self.path / "manifest.json", LOST)

    def probes(self, control: str) -> Path:
        """Folder of the resamplers of a control (`none`, `shuffled`, `random`)."""
        return self.path / ("probes" if control == "none" else f"controls/{control}/probes")

    def ridge(self, control: str) -> Path:
        """Folder of the ridge readouts of a control (`none`, `random`)."""
        return self.path / ("ridge" if control == "none" else f"controls/{control}/ridge")

    @property
    def means(self) -> Path:
        """File of the training split's mean targets."""
        return self.path / "mean_targets.safetensors"

    def mean_targets(self, device: "torch.device") -> dict[str, "torch.Tensor"]:
        """The training split's mean target (N, D) per teacher; raises UserError where they cannot be read."""
        from safetensors.torch import load_file

        with reading(self.means, LOST):
            return load_file(self.means, device=str(device))


@dataclass(frozen=True)
class AlignmentRun:
    """The directory of a finished run of `probing align`."""

    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made of; raises UserError where it cannot be read."""
        return read_json(self.path / "manifest.json", LOST)

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of its recipe that its numbers depend on, besides the checkpoint, and what the manifest names.

        Raises:
            UserError: the recipe cannot be read.
        """
        saved = self.path / "recipe.yaml"
        with reading(saved, LOST):
            recipe = read_yaml(saved)
            return {name: recipe[name] for name in ("layers", "coverage", "sample")}


def members(path: Path) -> list[Path]:
    """The runs inside a folder that is none itself, by name: those of one checkpoint trained with several seeds."""
    if (path / "recipe.yaml").exists() or not path.is_dir():
        return []
    return sorted(folder for folder in path.iterdir() if (folder / "recipe.yaml").exists())


def _first_difference(old: Any, new: Any, where: str = "") -> str:
    """Names the first field in which two recipes differ, or returns an empty string."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            name = f"{where}.{key}".lstrip(".")
            if name in SPEED_ONLY:
                continue
            inner = _first_difference(old.get(key), new.get(key), name)
            if inner:
                return inner
        return ""
    return "" if old == new else f"{where} is {old!r} there and {new!r} here"
