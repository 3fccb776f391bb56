"""A run is a directory: recipe, probes, manifest, scores, results, report.

Everything is written beside its place and renamed into it, and the manifest comes last: a run without manifest is
unfinished, a file that exists is whole.
"""

import contextlib
import errno
import json
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from probing.errors import BROKEN, UserError
from probing.recipe import ProbeRunRecipe, dump_recipe, read_yaml, validate

if TYPE_CHECKING:
    import torch

SPEED_ONLY = ("fit.workers", "fit.save_minutes", "fit.spread", "fit.report_to", "data.target_cache", "data.tower_cache")
"""Fields that a resumed run may change: they do not move a number."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)
"""What the system says of a folder that is read-only, a file, or taken away."""

LOST = "put it back, or make the run anew"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary file that becomes `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def left_overs(folder: Path) -> list[Path]:
    """What killed processes may have been writing, here or further down: our own files, and those of safetensors."""
    return [place for pattern in (".*.tmp", ".tmp??????") for place in folder.rglob(pattern)]


def remove_left_overs(places: Iterable[Path], idle: float = 0.0) -> None:
    """Removes temporary files and folders that nobody has touched for so many seconds."""
    for place in list(places):
        with contextlib.suppress(FileNotFoundError):
            inside = [place, *place.rglob("*")] if place.is_dir() else [place]
            if max(path.stat().st_mtime for path in inside) > time.time() - idle:
                continue
            shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is either whole or not there."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends well, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                _sync(file)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
            path.replace(old / path.name)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def disk_errors(where: Path, instead: str = "choose another --out") -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into one line.

    Args:
        where: folder or file that the block writes.
        instead: what to do where it cannot be written.

    Raises:
        UserError: in place of the OSError or of safetensors' own wrapping of it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if any(_is_full_disk(link) for link in _chain(error)):
            raise UserError(f"no disk space left at {where}; free some and run the same command again") from None
        if isinstance(error, OSError) and error.errno in (*UNWRITABLE, errno.ENAMETOOLONG):
            other = _outside(error, where)
            if other:
                raise UserError(
                    f"{other} cannot be written ({error.strerror}); of caches, HF_HOME, MLLM_PROBING_CACHE and TMPDIR "
                    "name other folders"
                ) from None
            raise UserError(f"{where} cannot be written ({error}); {instead}") from None
        raise


def _outside(error: OSError, where: Path) -> Path | None:
    """The file that an error names, where it is not in the folder that the block writes, nor above it."""
    if not isinstance(error.filename, str | os.PathLike):
        return None
    file, folder = Path(error.filename).absolute(), where.absolute()
    return None if file.is_relative_to(folder) or folder.is_relative_to(file) or folder.parent == file.parent else file


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from: torch wraps the system's own in one without number or text."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full_disk(error: BaseException) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors keeps the system's message, but not its number
    return isinstance(error, SafetensorError) and ("No space left" in str(error) or "File too large" in str(error))


@contextlib.contextmanager
def reading(file: Path, instead: str) -> Iterator[None]:
    """Turns whatever a broken file makes the libraries raise into one line; nothing that a file holds is ever run.

    Args:
        file: is read in the block.
        instead: what to do.

    Raises:
        UserError: in place of it.
    """
    try:
        yield
    except (*BROKEN, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        if isinstance(error, pickle.UnpicklingError):
            said = "it is a pickle that holds more than tensors, which may run code"
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {said}); {instead}") from None


def read_json(file: Path, instead: str) -> dict[str, Any]:
    """Reads a JSON object that this program wrote; raises UserError as `reading` does."""
    with reading(file, instead):
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return values


def read_json_lines(file: Path) -> list[Any]:
    """The whole lines of a JSONL file; a last one that a killed process left unfinished is not counted."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def require_space(where: Path, needed: int) -> None:
    """Refuses to start what will not fit.

    Raises:
        UserError: fewer than `needed` bytes are free where the run will lie.
    """
    existing = where
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"no disk space: the run needs about {needed / 1e9:.2f} GB at {where} and {free / 1e9:.2f} GB are free; "
            "free some, probe fewer layers, or choose another --out"
        )


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
        """Folder of the resamplers of a control (`no`, `shuffled`, `random`)."""
        return self.path / ("probes" if control == "no" else f"controls/{control}/probes")

    def ridge(self, control: str) -> Path:
        """Folder of the ridge readouts of a control (`no`, `random`)."""
        return self.path / ("ridge" if control == "no" else f"controls/{control}/ridge")

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
