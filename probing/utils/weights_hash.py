"""Identifies a model folder by exactly what is loaded from it: weights, configuration, code.

Hashes of files are cached by path, size, inode and times of change, so a large checkpoint is read once per change.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from probing.utils.cache_dir import cache_folder
from probing.utils.checkpoint_files import read_json_or_empty, weight_files
from probing.utils.errors import UserError
from probing.utils.files import write_text

NO_EFFECT = (
    "transformers_version", "_name_or_path", "_commit_hash", "architectures", "use_cache", "label2id",
    "base_model_name_or_path",
)  # fmt: skip
"""Fields of a configuration that cannot change a number."""
OVERRIDDEN = (
    "do_sample", "num_beams", "repetition_penalty", "temperature", "top_p", "top_k", "max_new_tokens", "max_length",
    "pad_token_id", "_from_model_config",
)  # fmt: skip
"""Fields of a generation configuration that `probing.models.generate.ask` sets itself."""
RENAMED = {"torch_dtype": "dtype"}
SETTLED = 2.0
"""Seconds after which a file's times tell it from a later version; hashes of younger files are not cached."""
SHOWN = 60
"""Length up to which a setting is stored as it is; longer ones, and paths, are stored as a hash."""


def loaded_weights(folder: Path) -> list[Path]:
    """Lists the weight files that are loaded from a folder; none if some are missing, which loading reports."""
    try:
        return weight_files(folder)
    except UserError:
        return []


def weights_hash(folder: Path) -> str:
    """Hashes the weight files that are loaded from a folder."""
    return files_hash(loaded_weights(folder))


def files_hash(files: Sequence[Path]) -> str:
    """Hashes the contents of files, in their order."""
    return digest([file_hash(file) for file in files])


def model_hash(folder: Path) -> str:
    """Hashes weights, configuration and code of a model folder; the layout of JSON has no effect."""
    has_code = "auto_map" in read_json_or_empty(folder, "config.json")
    code = [file_hash(file) for file in sorted(folder.glob("*.py"))] if has_code else []
    return digest([weights_hash(folder), configuration(folder), code])


def configuration(folder: Path) -> dict[str, str]:
    """Reads the fields of `config.json` that can change a number, those of nested configurations under dotted names."""
    return settings(read_json_or_empty(folder, "config.json"))


def generation_settings(folder: Path) -> dict[str, str]:
    """Reads the fields of `generation_config.json` that can change an answer."""
    values = read_json_or_empty(folder, "generation_config.json")
    return settings({name: value for name, value in values.items() if name not in OVERRIDDEN})


def settings(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens settings for comparison: equal numbers are equal text, and long values and paths are hashed."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = prefix + RENAMED.get(key, key)
        if key in NO_EFFECT:
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            flat |= settings(value, f"{name}.")
        else:
            text = json.dumps(_plain(value), sort_keys=True, default=str)
            flat[name] = text if len(text) <= SHOWN and "/" not in text else f"#{digest(text)[:12]}"
    return dict(sorted(flat.items()))


def file_hash(file: Path) -> str:
    """Hashes a file's content, or returns the cached hash if the file has not changed since."""
    path, status = file.resolve(), file.stat()
    return _hash_of_version(path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


@lru_cache(maxsize=4096)
def _hash_of_version(path: Path, stamp: tuple[int, ...]) -> str:
    version = {"path": str(path), "stamp": list(stamp)}
    name = f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    unusable = (OSError, RuntimeError, ValueError, LookupError, TypeError)  # such a cache only costs time
    with contextlib.suppress(*unusable):
        cached = json.loads((cache_folder() / "hashes" / name).read_text(encoding="utf-8"))
        if {key: cached[key] for key in version} == version:
            return str(cached["sha256"])
    settled = abs(time.time() - stamp[1] / 1e9) > SETTLED
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if settled:
        with contextlib.suppress(*unusable):
            write_text(cache_folder() / "hashes" / name, json.dumps(version | {"sha256": sha256}))
    return sha256


def _plain(value: Any) -> Any:
    """Returns a value in which 1.0 is 1, as Python compares them."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def digest(value: Any) -> str:
    """Hashes a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
