"""Prepares a process: UTF-8, waiting of threads, home folder, log lines."""

import logging
import os
import sys
import warnings

from probing.utils.cache_dir import home_folder, temporary_home

SPIN_COUNT = "3000"
"""Iterations for which an OpenMP thread spins before it sleeps.

The default of 300,000 takes CPU time from the threads it waits for if other programs run on the machine.
"""


def prepare_environment() -> None:
    """Restarts Python in UTF-8 mode if the locale is another, and sets `SPIN_COUNT` and a missing home.

    Libraries written in Rust read paths as UTF-8 in any locale.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # PYTHONIOENCODING may still ask for ASCII
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported
    if home_folder() is None:
        # Libraries would cache in a folder called "~" of the working directory, or ask for the user's name and fail.
        home = temporary_home()
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["HOME"] = str(home)
        os.environ.setdefault("USER", home.name)


def log_to_stderr(level: int, prefix: str = "") -> logging.Handler:
    """Logs messages of this project from `level` on, and those of libraries from WARNING; returns the handler."""
    for library in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(library, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a bar for every tiny model hides our own lines
    warnings.filterwarnings("ignore", category=FutureWarning)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logging.getLogger().addHandler(handler)
    for package in ("probing", "analysis", "reports"):
        logging.getLogger(package).setLevel(level)
    return handler
