"""Identifies a model folder by exactly what is loaded from it: weights, configuration, code.

Hashes of files are cached by path, size, inode and times of change, so that a large checkpoint is read once per change.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from probing.utils.cache_dir import cache_folder

PREFERENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights as transformers looks for them: the first that exists is loaded, and the others are not."""
NO_EFFECT = (
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "use_cache",
    "label2id",
    "base_model_name_or_path",
)
"""Fields of a configuration that cannot move a number."""
OVERRIDDEN = (
    "do_sample", "num_beams", "repetition_penalty", "temperature", "top_p", "top_k", "max_new_tokens", "max_length",
    "pad_token_id", "_from_model_config",
)  # fmt: skip
"""Fields of a generation configuration that `probing.models.generate.ask` sets itself."""
RENAMED = {"torch_dtype": "dtype"}
SETTLED = 2.0
"""Seconds after which a file's times tell it from a later version; younger files are hashed and not cached."""
SHOWN = 60
"""Characters of a setting that are stored as they are; longer ones, and paths, are stored as a hash."""


def loaded_weights(folder: Path) -> list[Path]:
    """Lists the weight files that are loaded from a folder; optimiser states and other formats are not among them."""
    config = _read_json(folder / "config.json")
    explicit = config.get("transformers_weights")
    names = [explicit] if isinstance(explicit, str) else PREFERENCE
    files = [folder / name for name in names if (folder / name).is_file()][:1]
    if files and files[0].name.endswith(".index.json"):
        shards = _read_json(files[0]).get("weight_map")
        files = [folder / name for name in sorted(set(shards.values()))] if isinstance(shards, dict) else []
    if "encoders" in config:
        files.append(folder / "encoders.safetensors")
    return [file for file in files if file.is_file()]


def weights_hash(folder: Path) -> str:
    """Hashes the weight files that are loaded from a folder."""
    return files_hash(loaded_weights(folder))


def files_hash(files: Sequence[Path]) -> str:
    """Hashes the contents of some files, in their order."""
    return digest([file_hash(file) for file in files])


def model_hash(folder: Path) -> str:
    """Hashes all that is loaded from a model folder, its own code included; how JSON is laid out does not count."""
    config = _read_json(folder / "config.json")
    code = [file_hash(file) for file in sorted(folder.glob("*.py"))] if "auto_map" in config else []
    return digest([weights_hash(folder), configuration(folder), code])


def configuration(folder: Path) -> dict[str, str]:
    """Reads the fields of `config.json` that can move a number, those of nested configurations under dotted names."""
    return settings(_read_json(folder / "config.json"))


def generation_settings(folder: Path) -> dict[str, str]:
    """Reads the fields of `generation_config.json` that can move an answer."""
    values = _read_json(folder / "generation_config.json")
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
    """Hashes a file's content; one that has not changed since it was last hashed is not read again."""
    path, status = file.resolve(), file.stat()
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return _hash_of_version(path, stamp)


@lru_cache(maxsize=4096)
def _hash_of_version(path: Path, stamp: tuple[int, ...]) -> str:
    entry = _entry(path)
    known = _read_json(entry) if entry else {}
    if known.get("stamp") == list(stamp) and known.get("path") == str(path) and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    settled = abs(time.time() - stamp[1] / 1e9) > SETTLED
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if entry and settled:
        _write(entry, json.dumps({"path": str(path), "stamp": stamp, "sha256": found}))
    return found


def _entry(path: Path) -> Path | None:
    """Where the hash of a file is cached; None where the user has no cache folder."""
    try:
        return cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    except RuntimeError:  # no home
        return None


def _write(file: Path, text: str) -> None:
    """Writes a cache entry in one step; a cache that cannot be written only costs time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as opened:
                opened.write(text)
            Path(temporary).replace(file)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
    except OSError:
        pass


def _read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; empty where there is none: whoever loads the file names its fault."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _plain(value: Any) -> Any:
    """A value in which 1.0 is 1, as Python compares them."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def digest(value: Any) -> str:
    """Hashes a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
