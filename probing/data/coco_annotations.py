"""Reads annotation files in COCO's layout; a broken entry is skipped, counted and named.

`pycocotools.coco.COCO` indexes objects by their own ids, so objects without one stop it and objects that share one
replace each other; it prints to standard output; and it trusts every entry. Hence entries are read here, and
pycocotools draws the masks.

COCO's annotations of train2017 are 0.45 GB of JSON, and 3 GB once they are parsed. So msgspec splits the file into
entries, and each is parsed when it is read.
"""

import gc
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from probing.data.image_modes import Size
from probing.utils.errors import BROKEN, UserError
from probing.utils.paths import path_below

logger = logging.getLogger(__name__)

Id = int | str
"""Integers, also those written as float or text, are integers."""


class Fault(ValueError):
    """An entry that cannot be used: a kind of fault, in the plural, and the name of the entry."""

    def __init__(self, kind: str, entry: object) -> None:
        super().__init__(f"{kind}: {entry}")
        self.kind, self.entry = kind, str(entry)


class Faults:
    """Counts the skipped entries of one file by kind of fault."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def __str__(self) -> str:
        return "; ".join(f"{number} {kind}, first {self.first[kind]}" for kind, number in self.counts.items())

    def add(self, error: Exception) -> None:
        """Counts one entry by the `Fault`, or any other exception, that reading it raised."""
        if not isinstance(error, Fault):
            error = Fault("broken entries", f"{type(error).__name__}: {error}")
        self.counts[error.kind] = self.counts.get(error.kind, 0) + 1
        self.first.setdefault(error.kind, error.entry[:120])

    def each(self, read: Callable[[Any], None], entries: Iterable[Any]) -> None:
        """Reads every entry, parsed or not; counts those that cannot be read."""
        collecting = gc.isenabled()
        gc.disable()  # it would search millions of entries, which have no cycles, again and again
        try:
            for entry in entries:
                try:
                    read(msgspec.json.decode(entry) if isinstance(entry, msgspec.Raw) else entry)
                except BROKEN as error:
                    self.add(error)
        finally:
            if collecting:
                gc.enable()

    def require(self, usable: object) -> None:
        """Logs the faults; raises UserError if there are some and nothing is usable."""
        if self.counts and not usable:
            raise UserError(f"{self.source} has no usable entries ({self}); download it again")
        if self.counts:
            logger.warning("%s: skipped %s", self.source.name, self)


@dataclass(frozen=True)
class AnnotationFile:
    """One annotation file.

    Attributes:
        annotations: unchecked, for `Faults.each`; as JSON unless the file has numbers that only Python writes.
        categories: unchecked.
        ids: id by name of the image file.
        sizes: annotated size by name of the image file, where it is known.
        names: names of the image files of every id; several for ids that images share.
    """

    annotations: list[Any]
    categories: Any
    ids: dict[str, Id]
    sizes: dict[str, Size]
    names: dict[Id, list[str]]

    def image_of(self, annotation: Mapping[str, Any]) -> str:
        """Returns the image file's name of an annotation; raises `Fault` if there is not exactly one."""
        identity = as_id(annotation["image_id"])
        names = self.names.get(identity, [])
        if len(names) > 1:
            raise Fault("annotations of an id that several images share", f"id {identity}")
        if not names:
            raise Fault("annotations of images that are not listed", f"id {identity}")
        return names[0]


class _Content(msgspec.Struct):
    """What is read of a file."""

    images: list[Any]
    annotations: list[msgspec.Raw] = msgspec.field(default_factory=list)
    categories: Any = None


def as_id(value: object) -> Id:
    """Reads an id; raises ValueError if it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isdecimal() and len(value) <= 18:
        return int(value)
    if isinstance(value, int | str) and not isinstance(value, bool) and value != "":
        return value
    raise ValueError(f"{value!r} is not an id")


def id_order(identity: Id) -> tuple[bool, Id]:
    """Sort key: integers before text."""
    return isinstance(identity, str), identity


def read_annotation_file(source: Path, folder: Path) -> AnnotationFile:
    """Reads one of COCO's annotation files and checks its images, whose names may begin with the split's folder.

    Raises:
        UserError: the file is not such a file, or none of its images is usable.
    """
    try:
        images, annotations, categories = _split(source.read_bytes())
    except BROKEN as error:
        raise UserError(
            f"{source} is not a COCO annotation file ({type(error).__name__}: {error}); download it again"
        ) from None
    faults, repeated = Faults(source), list[str]()
    file = AnnotationFile(annotations, categories, {}, {}, {})

    def read(entry: Any) -> None:
        identity, name, size = as_id(entry["id"]), _name_below(entry["file_name"], folder), _size(entry)
        if name in file.ids:
            if size != file.sizes.get(name):
                raise Fault("images listed again with another size", name)
            repeated.append(name)
        file.ids.setdefault(name, identity)
        if size is not None:
            file.sizes[name] = size
        if name not in file.names.setdefault(identity, []):
            file.names[identity].append(name)

    faults.each(read, images)
    faults.require(file.ids)
    shared = {identity: names for identity, names in file.names.items() if len(names) > 1}
    if shared:
        identity, names = next(iter(shared.items()))
        logger.warning(
            "%s: %d ids are shared by images, whose annotations are skipped, first id %s: %s",
            source.name, len(shared), identity, ", ".join(names),
        )  # fmt: skip
    if repeated:
        logger.info("%s: %d images are listed twice, first %s", source.name, len(repeated), repeated[0])
    return file


def _split(text: bytes) -> tuple[list[Any], list[Any], Any]:
    """Returns images, annotations and categories; msgspec refuses the NaN and Infinity that Python writes."""
    try:
        content = msgspec.json.decode(text, type=_Content)
        return content.images, content.annotations, content.categories
    except msgspec.DecodeError:
        parsed = json.loads(text.decode())
    images, annotations = parsed["images"], parsed.get("annotations", [])
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise TypeError("images and annotations must be lists")
    return images, annotations, parsed.get("categories")


def _name_below(value: object, folder: Path) -> str:
    """Reads a name below the split's folder; drops that folder and its parents, unless such a file exists."""
    name = path_below(value)
    parts = name.split("/")
    if folder.name not in parts[:-1] or (folder / name).is_file():
        return name
    last = len(parts) - 1 - parts[::-1].index(folder.name)
    return "/".join(parts[last + 1 :])


def _size(entry: Mapping[str, Any]) -> Size | None:
    try:
        width, height = int(entry["width"]), int(entry["height"])
    except BROKEN:
        return None
    return (width, height) if width > 0 and height > 0 else None
