"""A copy of a run that others may have: its probes and numbers, and nothing of the machine that it was made on."""

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from probing.recipe import cached_repository, read_yaml
from probing.runs.directory import Run
from probing.utils.cache_dir import home_folder
from probing.utils.errors import UserError
from probing.utils.files import LOST, read_json, reading
from probing.utils.paths import ELSEWHERE, looks_like_path

BANKS = ("probes", "ridge", "controls/*/probes", "controls/*/ridge")
"""Folders of a run that hold a folder of tensors per teacher."""
PUBLISHED = (
    *("recipe.yaml", "manifest.json", "mean_targets.safetensors", "learning_curves.csv", "results.csv"),
    *(f"{bank}/*/{name}" for bank in BANKS for name in ("config.json", "model.safetensors")),
    *("scores/*.safetensors", "scores/*.json"),
)
"""What of a run is published. Not its training state, pictures and generated features: those show the data's images."""
CARD = ("README.md", "figures")
"""What is drawn besides."""
SOURCES = ("checkpoint", "base", "vision_tower", "path", "id")
"""Fields that may name a folder, in recipes, manifests and configurations of probes."""
CACHES = ("target_cache", "tower_cache")
_PATH = re.compile(r"(?<![\w./])(?:/|~|\\|[A-Za-z]:[\\/])")
"""The beginning of an absolute path; where it ends cannot be seen, since names may hold blanks and quotes."""
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def published_files(folder: Path) -> Iterator[Path]:
    """Files of a run that are published, relative to it; what a killed process left behind is none of them."""
    for pattern in PUBLISHED:
        for file in sorted(folder.glob(pattern)):
            relative = file.relative_to(folder)
            if file.is_file() and not any(part.startswith(".") for part in relative.parts):
                yield relative


def require_banks(folder: Path, teachers: Iterable[str], instead: str) -> None:
    """Raises UserError where tensors of a teacher are missing or cut off, in any bank of a run or of what was pushed.

    Args:
        folder: of the run.
        teachers: whose.
        instead: what to do.
    """
    banks = [bank for pattern in BANKS for bank in sorted(folder.glob(pattern))]
    for file in (bank / teacher / "model.safetensors" for bank in banks for teacher in teachers):
        with reading(file, instead), safe_open(file, framework="np"):
            pass


def clean_copy(run: Run, folder: Path, link: bool = False) -> None:
    """Copies what is published of a run; folders of this machine become `elsewhere:NAME`, and caches are off.

    Args:
        run: a finished run.
        folder: an empty one.
        link: tensors are linked to and not copied, where the copy will not stay.

    Raises:
        UserError: a file cannot be read.
    """
    places = _places(run)
    for relative in published_files(run.path):
        source, target = run.path / relative, folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if relative.parts[0] == "scores" and source.suffix == ".safetensors":
            _copy_scores(source, target, places)
        elif source.suffix == ".safetensors" and link:
            target.symlink_to(source.resolve())
        elif source.suffix == ".safetensors":
            shutil.copyfile(source, target)
        elif source.suffix == ".json":
            with reading(source, LOST):
                values = json.loads(source.read_text(encoding="utf-8"))
            target.write_text(json.dumps(_clean(values, places), indent=2) + "\n", encoding="utf-8")
        elif source.suffix == ".yaml":
            text = yaml.safe_dump(_clean(read_yaml(source), places), sort_keys=False)
            target.write_text(text, encoding="utf-8")
        else:
            with reading(source, LOST):
                target.write_text(_named(source.read_text(encoding="utf-8"), places), encoding="utf-8")


def elsewhere(values: Any, where: str = "") -> list[tuple[str, str]]:
    """Fields of a published recipe that name folders of another machine, with the names."""
    if isinstance(values, dict):
        return [one for key, value in values.items() for one in elsewhere(value, f"{where}.{key}".lstrip("."))]
    if isinstance(values, str) and values.removeprefix("coco:").startswith(ELSEWHERE):
        return [(where, values.removeprefix("coco:").removeprefix(ELSEWHERE))]
    return []


def require_clean(folder: Path, run: Run) -> None:
    """The last look before anything leaves the machine.

    Raises:
        UserError: a file names a folder of this machine, or holds a token of the Hub.
    """
    home, token = home_folder() or Path("/"), get_token()
    secrets = [*_places(run), str(run.path.resolve()), *([str(home)] if len(home.parts) > 1 else [])]
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        text = _readable(file)
        name = file.relative_to(folder)
        found = next((place for place in secrets if re.search(re.escape(place) + r"(?![\w-])", text)), None)
        if found:
            raise UserError(f"{name} would name {found}, a folder of this machine; take it out of the run's own {name}")
        if _TOKEN.search(text) or (token and token in text):
            raise UserError(f"{name} would hold a token of the Hub; take it out of the run's own {name}")


def _readable(file: Path) -> str:
    """The strings of a file, without the escapes of its format; of tensors the metadata, of a picture nothing."""
    if file.suffix == ".png":
        return ""
    if file.suffix == ".safetensors":
        with reading(file, LOST), safe_open(file, framework="np") as stored:
            values: Any = [*stored.keys(), *_parsed(stored.metadata() or {})]
    elif file.suffix == ".json":
        values = json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".yaml":
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    elif file.suffix == ".csv":
        values = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    else:
        values = file.read_text(encoding="utf-8")
    return "\n".join(_strings(values))


def _parsed(metadata: dict[str, str]) -> Iterator[Any]:
    for text in metadata.values():
        try:
            yield json.loads(text)
        except ValueError:
            yield text


def _strings(values: Any) -> Iterator[str]:
    """Every string in nested values, keys too."""
    if isinstance(values, dict):
        values = [*values.keys(), *values.values()]
    if isinstance(values, list):
        for value in values:
            yield from _strings(value)
    elif isinstance(values, str):
        yield values


def _places(run: Run) -> dict[str, str]:
    """Folders of this machine that a run's recipe or manifest names, the longest first, and what they are called."""
    found: dict[str, str] = {}

    def gather(values: Any) -> None:
        for key, value in values.items() if isinstance(values, dict) else ():
            gather(value)
            if key in SOURCES and isinstance(value, str) and _is_folder(value.removeprefix("coco:")):
                place = value.removeprefix("coco:").rstrip(os.sep)
                found[place] = cached_repository(place) or place.rsplit(os.sep, 1)[-1] or "folder"

    gather(read_yaml(run.path / "recipe.yaml"))
    gather(run.manifest)
    return {place: found[place] for place in sorted(found, key=len, reverse=True)}


def _is_folder(source: str) -> bool:
    return looks_like_path(source) and source.strip("/.~\\") != ""


def _named(text: str, places: dict[str, str]) -> str:
    """Text with the names of folders in their place."""
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def _clean(values: Any, places: dict[str, str], key: str = "") -> Any:
    if isinstance(values, dict):
        return {name: _clean(value, places, name) for name, value in values.items()}
    if isinstance(values, list):
        return [_clean(value, places) for value in values]
    if not isinstance(values, str):
        return values
    if key in CACHES:
        return "off"
    scheme, source = ("coco:", values[5:]) if values.startswith("coco:") else ("", values)
    if key in SOURCES and source.rstrip(os.sep) in places:
        name = places[source.rstrip(os.sep)]
        return name if cached_repository(source) else f"{scheme}{ELSEWHERE}{name}"
    return _without_folders(values) if key == "reason" else _named(values, places)


def _without_folders(reason: str) -> str:
    """Why an image was left out, up to the path that an error names; the image is named next to it."""
    path = _PATH.search(reason)
    return reason[: path.start()].rstrip(" '\"(:[=") if path else reason


def _copy_scores(source: Path, target: Path, places: dict[str, str]) -> None:
    """Scores, whose metadata say which images were left out and why."""
    with reading(source, LOST):
        with safe_open(source, framework="np") as stored:
            metadata = dict(stored.metadata() or {})
        if "pass" in metadata:
            values = json.loads(metadata["pass"])
            values["skipped"] = [[*row[:2], _without_folders(row[2])] for row in values.get("skipped", [])]
            metadata["pass"] = json.dumps(_clean(values, places))
        save_file(load_file(source), target, metadata)


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two manifests are of one run, perhaps evaluated further, and hold the same part of it."""

    def identity(manifest: dict[str, Any]) -> list[Any]:
        made = [manifest.get("checkpoint", {}).get("sha256"), manifest.get("finished"), manifest.get("left_out")]
        teachers = {name: teacher["sha256"] for name, teacher in manifest.get("teachers", {}).items()}
        return [*made, teachers, manifest.get("data", {}).get("train_digest"), manifest.get("prompt")]

    return identity(one) == identity(other)


def holds(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder holds this run already; raises UserError where what it says of itself cannot be read."""
    made = folder / "manifest.json"
    if not made.is_file():
        return False
    with reading(made, LOST):
        return same_run(read_json(made, LOST), manifest)


def foreign(names: Iterable[str]) -> list[str]:
    """Those of a folder's or repository's entries that no push writes."""
    own = {pattern.split("/")[0] for pattern in PUBLISHED} | set(CARD)
    return [name for name in names if name.split("/")[0] not in own]
