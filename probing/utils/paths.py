"""Paths that users type, and paths read from files."""

import os
from pathlib import Path, PurePosixPath

from probing.utils.errors import UserError

ELSEWHERE = "elsewhere:"
"""Prefix of a folder name, in a published recipe, that has no path on this machine yet."""


def looks_like_path(source: str) -> bool:
    """Returns whether a name can only be a path, not a Hub id."""
    return source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or os.sep in source[:2]


def local_path(source: str) -> Path:
    """Expands a path that a user typed.

    Raises:
        UserError: it is not a valid path, its user does not exist, or it is an `elsewhere:` name.
    """
    if source.startswith(ELSEWHERE):
        raise UserError(
            f"{source!r} has no path on this machine; set it in the recipe or as KEY=VALUE, such as "
            "backbone.checkpoint=DIR, data.path=coco:DIR or teachers.depth.id=DIR"
        )
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = source if len(source) < 80 else source[:80] + " …"
        raise UserError(f"{shown!r} is no path ({getattr(error, 'strerror', None) or error}); fix it") from None
    return path


def path_below(name: object) -> str:
    """Checks that a file name stays inside its folder, and returns it with slashes.

    Raises:
        ValueError: the name is not text, empty, absolute, or contains `..`.
    """
    path = PurePosixPath(name.replace("\\", "/")) if isinstance(name, str) else PurePosixPath()
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is not a plain path below its folder")
    return str(path)


def is_file(path: Path) -> bool:
    """Returns whether a file exists; False for invalid names."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
