"""COCO's panoptic annotations as semantic label maps, read from the official JSON and PNGs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probing.data.annotation_file import Fault, Faults, Key, as_key, key_order, read_annotation_file
from probing.data.coco import open_image
from probing.utils.errors import BROKEN, UserError

UNLABELED = 255
"""Label of pixels that belong to no segment."""


@dataclass(frozen=True)
class Panoptic:
    """The panoptic annotations of one split.

    Attributes:
        folder: folder of the PNGs.
        names: class names; a class's number is its place in the official order (by category id: things, then stuff).
        segments: per image file, the PNG's name and the class of every segment id.
        sizes: per image file its annotated rows and columns, where these are known.
    """

    folder: Path
    names: list[str]
    segments: dict[str, tuple[str, dict[int, int]]]
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def labels(self, image: str) -> NDArray[np.uint8]:
        """Class of every pixel, (rows, columns) at full size; `UNLABELED` where there is none.

        Raises:
            OSError: the PNG is missing or corrupt, or holds none of the image's segments.
        """
        png, classes = self.segments[image]
        best: tuple[int, NDArray[np.uint8]] | None = None
        for coded in open_image(self.folder / png, _codings):
            ids, places = np.unique(coded, return_inverse=True)
            known = sum(int(identity) in classes for identity in ids)
            if best is None or known > best[0]:
                table = np.array([classes.get(int(identity), UNLABELED) for identity in ids], dtype=np.uint8)
                best = known, table[places].reshape(coded.shape)
        assert best is not None
        if classes and not best[0]:
            raise OSError(f"none of its {len(classes)} segment ids is in {png}")
        return best[1]


def _codings(image: Image.Image) -> Sequence[NDArray[np.int64]]:
    """Reads the segment ids (rows, columns) of a PNG, in every way that they may be coded, the official one first.

    Officially an id is R + 256 G + 65536 B; files of one channel hold the id itself, or its place in a palette.
    """
    if image.mode in ("LA", "PA", "La"):
        image = image.getchannel(0)
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        return [grey, grey * (1 + 256 + 65536)]
    places = [np.asarray(image).astype(np.int64)] if image.mode == "P" else []
    if image.mode not in ("RGB", "RGBA", "RGBX", "RGBa"):
        image = image.convert("RGB")
    colours = np.asarray(image)[..., :3].astype(np.int64)
    if not places and (colours == colours[..., :1]).all():
        places = [colours[..., 0]]
    return [colours @ np.array([1, 256, 65536]), *places]


def read_panoptic(root: Path, split: str) -> Panoptic:
    """Reads `annotations/panoptic_<split>.json` of a folder in COCO's official layout.

    Images and segments that cannot be used are left out, counted and named.

    Raises:
        UserError: the file or the folder of PNGs is missing, or the file is broken or none of its images can be used.
    """
    source = root / "annotations" / f"panoptic_{split}.json"
    folder = source.with_suffix("")
    for path in (source, folder):
        if not path.exists():
            raise UserError(
                f"no {path}; COCO's panoptic annotations are needed: unpack {source.name} and its PNGs there"
            )
    file, faults = read_annotation_file(source, root / split), Faults(source)
    names, number = read_classes(file.whole, faults)
    require_few(names, source)
    segments: dict[str, tuple[str, dict[int, int]]] = {}
    for entry in file.whole.get("annotations", []):
        try:
            name, png = file.image_of(entry), _plain(entry["file_name"])
            if name in segments:
                raise Fault("further label maps of an image that has one", name)
            own: dict[int, int] = {}
            for segment in entry["segments_info"]:
                try:
                    own[int(as_key(segment["id"]))] = class_of(segment, number, name)
                except BROKEN as error:
                    faults.add(error)
            segments[name] = png, own
        except BROKEN as error:
            faults.add(error)
    faults.require(any(own for _, own in segments.values()))
    return Panoptic(folder, names, segments, {name: (rows, columns) for name, (columns, rows) in file.sizes.items()})


def read_classes(whole: Mapping[str, Any], faults: Faults) -> tuple[list[str], dict[Key, int]]:
    """Reads the classes of an annotation file.

    Returns:
        Their names in the order of their ids, and the place of each id in it.
    """
    categories = whole.get("categories")
    if not isinstance(categories, list):
        raise UserError(f"{faults.source} lists no categories; download it again")
    found: dict[Key, str] = {}
    for category in categories:
        try:
            identity, name = as_key(category["id"]), category["name"]
            if not isinstance(name, str):
                raise Fault("categories whose name is not text", f"{name!r}")
            if found.setdefault(identity, name) != name:
                raise Fault("categories with the id of another", f"id {identity}")
        except BROKEN as error:
            faults.add(error)
    ordered = sorted(found, key=key_order)
    return [found[identity] for identity in ordered], {identity: place for place, identity in enumerate(ordered)}


def class_of(entry: Mapping[str, Any], number: Mapping[Key, int], image: str) -> int:
    """Reads the class of an object or segment of an image; raises ValueError or LookupError where it has none."""
    identity = as_key(entry["category_id"])
    if identity not in number:
        raise Fault("objects of a category that is not listed", f"category {identity} in {image}")
    return number[identity]


def require_few(names: list[str], source: Path) -> None:
    """Raises UserError where there are more classes than a label map has numbers for."""
    if len(names) >= UNLABELED:
        raise UserError(f"{source} has {len(names)} categories; at most {UNLABELED - 1} are supported")


def _plain(name: object) -> str:
    if not isinstance(name, str) or not name or PurePosixPath(name).name != name or "\\" in name or name == "..":
        raise Fault("label maps whose name is not a plain file name", f"{name!r}")
    return name
