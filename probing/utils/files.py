"""Files are written whole or not at all; disk errors and broken files become one line."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from probing.utils.errors import BROKEN, UserError

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
