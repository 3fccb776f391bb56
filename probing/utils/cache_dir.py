"""The folder for caches that runs share."""

import os
import tempfile
from pathlib import Path

VARIABLE = "MLLM_PROBING_CACHE"
"""Environment variable that sets the cache folder."""


def cache_folder() -> Path:
    """Returns `$MLLM_PROBING_CACHE`, else `mllm-probing/` in the user's cache folder."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder)
    parent = os.environ.get("XDG_CACHE_HOME") or (home_folder() or temporary_home()) / ".cache"
    return Path(parent) / "mllm-probing"


def home_folder() -> Path | None:
    """Returns the user's home; None if neither HOME nor the password file has one, as in containers."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises
    return None if home == "~" else Path(home)


def temporary_home() -> Path:
    """Returns a replacement for a missing home, in the temporary folder."""
    return Path(tempfile.gettempdir()) / f"home-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
