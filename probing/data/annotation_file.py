"""Annotation files in COCO's layout, entry by entry: a broken entry is left out, counted and named."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from probing.utils.errors import BROKEN, UserError

logger = logging.getLogger(__name__)

Key = int | str
"""An id: integers, also as float or text, are integers."""
Size = tuple[int, int]
"""Width and height."""


class Fault(ValueError):
    """One entry that cannot be used: the kind of fault, in the plural, and what identifies the entry."""

    def __init__(self, kind: str, entry: object) -> None:
        super().__init__(f"{kind}: {entry}")
        self.kind, self.entry = kind, str(entry)


class Faults:
    """Counts the entries of one file that are left out, by kind of fault."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return "; ".join(f"{number} {kind}, first {self.first[kind]}" for kind, number in self.counts.items())

    def add(self, error: Exception) -> None:
        """Counts one entry; `error` is a `Fault`, or what reading the entry raised."""
        if not isinstance(error, Fault):
            error = Fault("broken entries", f"{type(error).__name__}: {error}")
        self.counts[error.kind] = self.counts.get(error.kind, 0) + 1
        self.first.setdefault(error.kind, error.entry[:120])

    def log(self) -> None:
        """Warns in one line, where anything was left out."""
        if self:
            logger.warning("%s: left out %s", self.source.name, self)

    def require(self, rest: object) -> None:
        """Logs the faults; raises UserError where they leave nothing of the file."""
        if self and not rest:
            raise UserError(f"{self.source} is not an annotation file that can be used ({self}); download it again")
        self.log()


@dataclass(frozen=True)
class AnnotationFile:
    """One annotation file.

    Attributes:
        whole: as it was read.
        ids: by name of the image file.
        sizes: annotated width and height by name of the image file; images without are absent.
        files: name of the image file by id; ids that several images have are absent.
        shared: ids that several images have, with the names of these.
        faults: broken entries of `images`.
    """

    whole: dict[str, Any]
    ids: dict[str, Key]
    sizes: dict[str, Size]
    files: dict[Key, str]
    shared: dict[Key, list[str]]
    faults: Faults

    def image_of(self, entry: Mapping[str, Any]) -> str:
        """Name of the image file that an annotation belongs to; raises `Fault` where that is unclear."""
        identity = as_key(entry["image_id"])
        if identity in self.shared:
            raise Fault("annotations of an id that several images have", f"id {identity}")
        if identity not in self.files:
            raise Fault("annotations of images that are not listed", f"id {identity}")
        return self.files[identity]


def as_key(value: object) -> Key:
    """Reads an id; raises ValueError where it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isdecimal() and len(value) <= 18:
        return int(value)
    if isinstance(value, int | str) and not isinstance(value, bool) and value != "":
        return value
    raise ValueError(f"{value!r} is no id")


def key_order(key: Key) -> tuple[bool, Key]:
    """Sorts integers before text."""
    return isinstance(key, str), key


def relative_name(name: object) -> str:
    """Reads the name of a file below a folder; backslashes, as Windows writes them, separate folders.

    Raises:
        ValueError: it is not the plain path of a file below the folder.
    """
    path = PurePosixPath(name.replace("\\", "/")) if isinstance(name, str) else PurePosixPath()
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the file name {name!r} is not a plain path below its folder")
    return str(path)


def read_annotation_file(source: Path, folder: Path) -> AnnotationFile:
    """Reads one of COCO's annotation files.

    Args:
        source: the JSON file.
        folder: of the split's images; names may begin with that of the folder (`train2017/000000000009.jpg`).

    Raises:
        UserError: the file is no such file, or none of its images can be used.
    """
    try:
        whole = json.loads(source.read_text(encoding="utf-8"))
        entries = whole["images"]
        if not isinstance(entries, list) or not isinstance(whole.get("annotations", []), list):
            raise TypeError("images and annotations are no lists")
    except BROKEN as error:
        raise UserError(
            f"{source} is not an annotation file of COCO ({type(error).__name__}: {error}); download it again"
        ) from None
    faults, ids, sizes, names = Faults(source), dict[str, Key](), dict[str, Size](), dict[Key, list[str]]()
    repeated: list[str] = []
    for entry in entries:
        try:
            identity, name = as_key(entry["id"]), _below(relative_name(entry["file_name"]), folder)
            size = _size(entry)
            if name in ids:
                if size != sizes.get(name):
                    raise Fault("images that are listed again with another size", name)
                repeated.append(name)
        except BROKEN as error:
            faults.add(error)
            continue
        ids.setdefault(name, identity)
        if size is not None:
            sizes[name] = size
        if name not in names.setdefault(identity, []):
            names[identity].append(name)
    if faults and not ids:
        raise UserError(f"{source} is not an annotation file of COCO ({faults}); download it again")
    if repeated:
        logger.info("%s: %d images are listed twice, first %s", source.name, len(repeated), repeated[0])
    files = {identity: own[0] for identity, own in names.items() if len(own) == 1}
    shared = {identity: own for identity, own in names.items() if len(own) > 1}
    return AnnotationFile(whole, ids, sizes, files, shared, faults)


def _below(name: str, folder: Path) -> str:
    """Without the name of the split's folder and what comes before it, where there is no such file below the folder."""
    parts = PurePosixPath(name).parts
    if folder.name not in parts[:-1] or (folder / name).is_file():
        return name
    last = len(parts) - 1 - parts[::-1].index(folder.name)
    return "/".join(parts[last + 1 :]) or name


def _size(entry: Mapping[str, Any]) -> Size | None:
    try:
        width, height = int(entry["width"]), int(entry["height"])
    except BROKEN:
        return None
    return (width, height) if width > 0 and height > 0 else None
