"""Where what can be made again is kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MLLM_PROBING_CACHE`, else `mllm-probing/` below the user's cache folder."""
    own = os.environ.get("MLLM_PROBING_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm-probing"
