"""Atomic writes, and one-line errors for full disks and broken files."""

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

from probing.utils.errors import BROKEN, UserError, first_line

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)
"""Error numbers of paths that are read-only, of the wrong kind, or missing."""

RESTORE_ADVICE = "put it back, or start a new run"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces `path` if the block succeeds."""
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


def temporary_files(folder: Path) -> list[Path]:
    """Lists temporary files and folders, ours and safetensors', that killed processes left below a folder."""
    return [path for pattern in (".*.tmp", ".tmp??????") for path in folder.rglob(pattern)]


def remove_temporary_files(paths: Iterable[Path], idle: float = 0.0) -> None:
    """Removes temporary files and folders that have not changed for `idle` seconds."""
    for path in list(paths):
        with contextlib.suppress(FileNotFoundError):
            contents = [path, *path.rglob("*")] if path.is_dir() else [path]
            if max(item.stat().st_mtime for item in contents) > time.time() - idle:
                continue
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `path` if the block succeeds."""
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
def disk_errors(where: Path, advice: str = "choose another --out") -> Iterator[None]:
    """Turns errors of a full disk or an unwritable folder into one line.

    Args:
        where: folder or file that the block writes.
        advice: what to do if it cannot be written.

    Raises:
        UserError: replaces the OSError, or the error in which safetensors wraps it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if any(_is_full_disk(cause) for cause in _causes(error)):
            raise UserError(f"no disk space left at {where}; free some and run the same command again") from None
        if isinstance(error, OSError) and error.errno in (*UNWRITABLE, errno.ENAMETOOLONG):
            if other := _path_outside(error, where):
                raise UserError(
                    f"{other} cannot be written ({error.strerror}); set HF_HOME, MLLM_PROBING_CACHE or TMPDIR to "
                    "another folder"
                ) from None
            raise UserError(f"{where} cannot be written ({error}); {advice}") from None
        raise


def _path_outside(error: OSError, where: Path) -> Path | None:
    """Returns the path in an error if it is neither inside nor above the folder that the block writes."""
    if not isinstance(error.filename, str | os.PathLike):
        return None
    file, folder = Path(error.filename).absolute(), where.absolute()
    return None if file.is_relative_to(folder) or folder.is_relative_to(file) or folder.parent == file.parent else file


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes: torch wraps an OSError in an error without number or text."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full_disk(error: BaseException) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors keeps the system's message, but not the error number
    return isinstance(error, SafetensorError) and ("No space left" in str(error) or "File too large" in str(error))


@contextlib.contextmanager
def reading(file: Path, advice: str) -> Iterator[None]:
    """Turns errors that libraries raise for a broken file into one line.

    Args:
        file: the file that the block reads.
        advice: what to do.

    Raises:
        UserError: replaces the error of the library.
    """
    try:
        yield
    except (*BROKEN, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = first_line(error)[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is a pickle that holds more than tensors, which may run code"
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {reason}); {advice}") from None


def read_json(file: Path, advice: str) -> dict[str, Any]:
    """Reads a JSON object; raises UserError as `reading` does."""
    with reading(file, advice):
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return values


def read_json_lines(file: Path) -> list[Any]:
    """Reads a JSONL file up to its first incomplete line, which a killed process left."""
    if not file.exists():
        return []
    values = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            values.append(json.loads(line))
        except ValueError:
            break
    return values


def free_bytes(where: Path) -> int:
    """Returns the free disk space at a path that may not exist yet."""
    return shutil.disk_usage(next(path for path in (where, *where.parents) if path.exists())).free


def require_space(where: Path, needed: int) -> None:
    """Raises UserError if fewer than `needed` bytes are free at a path."""
    if (free := free_bytes(where)) < needed:
        raise UserError(
            f"no disk space: the run needs about {needed / 1e9:.2f} GB at {where} and {free / 1e9:.2f} GB are free; "
            "free some, probe fewer layers, or choose another --out"
        )
