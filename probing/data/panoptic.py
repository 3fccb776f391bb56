"""Reads COCO's panoptic annotations, the official JSON and PNGs, as semantic label maps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probing.data.coco_annotations import Fault, Faults, Id, as_id, id_order, read_annotation_file
from probing.data.image_modes import Size, open_image
from probing.utils.errors import UserError
from probing.utils.paths import path_below

UNLABELED = 255
"""Label of pixels that belong to no segment."""
RGB_TO_ID = np.array([1, 256, 65536])


@dataclass(frozen=True)
class Panoptic:
    """The panoptic annotations of one split.

    Attributes:
        folder: of the PNGs.
        names: class names; a class's label is its position in the official order (by category id: things, then stuff).
        segments: by image file, the PNG's name and the label of every segment id.
        sizes: by image file, where they are known.
    """

    folder: Path
    names: list[str]
    segments: dict[str, tuple[str, dict[int, int]]]
    sizes: dict[str, Size] = field(default_factory=dict)

    @property
    def images(self) -> Collection[str]:
        """File names of the images that have a label map."""
        return self.segments.keys()

    def labels(self, image: str) -> NDArray[np.uint8]:
        """Returns the class of every pixel, (rows, columns) at full size; `UNLABELED` where there is none.

        Raises:
            OSError: the PNG is missing or corrupt, or contains none of the image's segments.
        """
        png, classes = self.segments[image]
        with open_image(self.folder / png) as opened:
            codings = _segment_ids(opened)
        found = [np.unique(ids, return_inverse=True) for ids in codings]
        known = [sum(int(identity) in classes for identity in ids) for ids, _ in found]
        if classes and not any(known):
            raise OSError(f"{png} contains none of its {len(classes)} segment ids")
        ids, positions = found[known.index(max(known))]
        table = np.array([classes.get(int(identity), UNLABELED) for identity in ids], dtype=np.uint8)
        return table[positions].reshape(codings[0].shape)


def _segment_ids(image: Image.Image) -> Sequence[NDArray[np.int64]]:
    """Reads the segment ids (rows, columns) of a PNG in every way that they may be coded, the official one first.

    Officially an id is R + 256 G + 65536 B; files of one channel contain the id itself, or its palette index.
    """
    if image.mode in ("LA", "PA", "La"):
        image = image.getchannel(0)
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        return [grey, grey * RGB_TO_ID.sum()]
    one_channel = [np.asarray(image).astype(np.int64)] if image.mode == "P" else []
    if image.mode not in ("RGB", "RGBA", "RGBX", "RGBa"):
        image = image.convert("RGB")
    colours = np.asarray(image)[..., :3].astype(np.int64)
    if not one_channel and (colours == colours[..., :1]).all():
        one_channel = [colours[..., 0]]
    return [colours @ RGB_TO_ID, *one_channel]


def read_panoptic(root: Path, split: str) -> Panoptic:
    """Reads `annotations/panoptic_<split>.json` of a folder in COCO's official layout.

    Unusable images and segments are skipped, counted and named.

    Raises:
        UserError: the file or the folder of PNGs is missing, the file is broken, or none of its images is usable.
    """
    source = root / "annotations" / f"panoptic_{split}.json"
    folder = source.with_suffix("")
    for path in (source, folder):
        if not path.exists():
            raise UserError(f"no panoptic annotations: {path} is missing; unpack {source.name} and its PNGs there")
    file, faults = read_annotation_file(source, root / split), Faults(source)
    names, labels = read_classes(file.categories, faults)
    segments: dict[str, tuple[str, dict[int, int]]] = {}

    def read(entry: Any) -> None:
        name, png = file.image_of(entry), path_below(entry["file_name"])
        if name in segments:
            raise Fault("further label maps of an image", name)
        own: dict[int, int] = {}

        def read_segment(segment: Any) -> None:
            own[int(as_id(segment["id"]))] = class_of(segment, labels, name)

        faults.each(read_segment, entry["segments_info"])
        segments[name] = png, own

    faults.each(read, file.annotations)
    faults.require(any(own for _, own in segments.values()))
    return Panoptic(folder, names, segments, file.sizes)


def read_classes(categories: object, faults: Faults) -> tuple[list[str], dict[Id, int]]:
    """Reads the classes of an annotation file.

    Returns:
        Their names in order of their ids, and the label of each id: its position in that order.

    Raises:
        UserError: the file has no categories, or more than a label map can number.
    """
    if not isinstance(categories, list):
        raise UserError(f"{faults.source} has no list of categories; download it again")
    classes: dict[Id, str] = {}

    def read(category: Any) -> None:
        identity, name = as_id(category["id"]), category["name"]
        if not isinstance(name, str):
            raise Fault("categories whose name is not text", f"{name!r}")
        if classes.setdefault(identity, name) != name:
            raise Fault("categories that repeat an id", f"id {identity}")

    faults.each(read, categories)
    if len(classes) >= UNLABELED:
        raise UserError(f"{faults.source} has {len(classes)} categories; at most {UNLABELED - 1} are supported")
    order = sorted(classes, key=id_order)
    return [classes[identity] for identity in order], {identity: label for label, identity in enumerate(order)}


def class_of(entry: Mapping[str, Any], labels: Mapping[Id, int], image: str) -> int:
    """Reads the label of an object or segment of an image; raises ValueError or LookupError if it has none."""
    identity = as_id(entry["category_id"])
    if identity not in labels:
        raise Fault("objects of a category that is not listed", f"category {identity} in {image}")
    return labels[identity]
