"""Paths as users type them."""

import os
from pathlib import Path, PurePosixPath

from probing.utils.errors import UserError

ELSEWHERE = "elsewhere:"
"""Stands before the name of a folder of another machine, in the recipe of a run that was published."""


def looks_like_path(source: str) -> bool:
    """Whether a name can only be a folder's, and no Hub id."""
    return source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or os.sep in source[:2]


def local_path(source: str) -> Path:
    """A path as a user types it.

    Raises:
        UserError: no file can be called that, or it is in the home of a user that there is not, or on another machine.
    """
    if source.startswith(ELSEWHERE):
        raise UserError(
            f"{source!r}: the recipe comes from another machine, and does not say where its "
            f"{source.removeprefix(ELSEWHERE)!r} lies on this one; write the folder into the recipe, or give it as "
            "KEY=VALUE, such as backbone.checkpoint=DIR, data.path=coco:DIR or teachers.depth.id=DIR"
        )
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = source if len(source) < 80 else source[:80] + " …"
        raise UserError(f"{shown!r} is no path ({getattr(error, 'strerror', None) or error}); mend it") from None
    return path


def path_below(name: object) -> str:
    """Checks a file name that was read from a file; backslashes, as Windows writes them, separate folders.

    Returns:
        The relative path with slashes.

    Raises:
        ValueError: the name is not text, is empty or absolute, or leaves its folder.
    """
    path = PurePosixPath(name.replace("\\", "/")) if isinstance(name, str) else PurePosixPath()
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is not a plain path below its folder")
    return str(path)


def is_file(path: Path) -> bool:
    """Whether a file exists; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
