"""Where results that can be computed again are cached between runs."""

import os
import tempfile
from pathlib import Path

VARIABLE = "MLLM_PROBING_CACHE"
"""Names the cache folder."""


def cache_folder() -> Path:
    """`$MLLM_PROBING_CACHE`, else `mllm-probing/` in the cache folder of the user, or of a temporary home."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    users = os.environ.get("XDG_CACHE_HOME") or (home_folder() or temporary_home()) / ".cache"
    return Path(users) / "mllm-probing"


def home_folder() -> Path | None:
    """The user's home, or None where neither HOME nor the password file names one, as in containers."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises
    return None if home == "~" else Path(home)


def temporary_home() -> Path:
    """A folder of this user in the temporary one."""
    return Path(tempfile.gettempdir()) / f"home-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
