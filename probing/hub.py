"""Finding models: a local folder or a Hub id, checked before anything heavy is loaded."""

import os
from pathlib import Path
from typing import Any

import probing.compat  # noqa: F401
from probing.errors import UserError
from probing.provenance import weights_hash


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or os.sep in source[:2]


def locate(source: str, what: str) -> str:
    """Returns the folder or Hub id to load.

    Raises:
        UserError: it looks like a path but there is no such folder, or the folder holds no model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "model_index.json").exists():
            raise UserError(
                f"no {what} in {source}: the folder has no config.json; give a folder made by save_pretrained"
            )
        return str(path)
    if path.exists():
        raise UserError(f"no {what} at {source}: it is a file; give the folder that holds config.json")
    if _looks_like_path(source) or "/" not in source:
        raise UserError(f"no such {what}: {source}; give an existing folder or a Hub id such as org/name")
    return source


def identity(source: str, commit: str | None) -> str:
    """Hash that identifies the weights: of the files of a folder, or the commit of a Hub repository."""
    path = Path(source)
    return f"sha256:{weights_hash(path)}" if path.is_dir() else f"commit:{commit or 'unknown'}"


def load_config(source: str, what: str, **kwargs: Any) -> Any:
    """Reads a model's configuration.

    Raises:
        UserError: it cannot be read or reached, or its model type is unknown to transformers.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        place = "" if Path(source).exists() else "there is no such folder, and as a Hub id "
        raise UserError(f"{what} {source} cannot be read: {place}{first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a closing full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
