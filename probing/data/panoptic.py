"""COCO's panoptic annotations as semantic label maps, read from the official JSON and PNGs."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probing.data.coco import read_image
from probing.errors import BROKEN, UserError

UNLABELED = 255
"""Label of pixels that belong to no segment."""


@dataclass(frozen=True)
class Panoptic:
    """The panoptic annotations of one split.

    Attributes:
        folder: folder of the PNGs.
        names: class names; a class's number is its place in the official order (by category id: things, then stuff).
        segments: per image file, the PNG's name and the class of every segment id.
    """

    folder: Path
    names: list[str]
    segments: dict[str, tuple[str, dict[int, int]]]

    def labels(self, image: str) -> NDArray[np.uint8]:
        """Class of every pixel, (rows, columns) at full size; `UNLABELED` where there is none.

        Raises:
            OSError: the PNG is missing or corrupt.
        """
        png, classes = self.segments[image]
        colours = np.asarray(read_image(self.folder / png), dtype=np.int64)
        ids, places = np.unique(colours @ np.array([1, 256, 65536]), return_inverse=True)
        table = np.array([classes.get(int(identity), UNLABELED) for identity in ids], dtype=np.uint8)
        return table[places].reshape(colours.shape[:2])


def read_panoptic(root: Path, split: str) -> Panoptic:
    """Reads `annotations/panoptic_<split>.json` of a folder in COCO's official layout.

    Raises:
        UserError: the file or the folder of PNGs is missing, or the file is broken or names a path outside.
    """
    source = root / "annotations" / f"panoptic_{split}.json"
    folder = source.with_suffix("")
    for path in (source, folder):
        if not path.exists():
            raise UserError(
                f"no {path}; COCO's panoptic annotations are needed: unpack {source.name} and its PNGs there"
            )
    try:
        whole: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        names, number = read_classes(whole)
        files = {image["id"]: image["file_name"] for image in whole["images"]}
        segments = {
            files[entry["image_id"]]: (
                _plain(entry["file_name"], source),
                {segment["id"]: number[segment["category_id"]] for segment in entry["segments_info"]},
            )
            for entry in whole["annotations"]
        }
    except BROKEN as error:
        raise UserError(
            f"{source} is not a panoptic annotation file of COCO ({type(error).__name__}: {error}); download it again"
        ) from None
    require_few(names, source)
    return Panoptic(folder, names, segments)


def read_classes(whole: dict[str, Any]) -> tuple[list[str], dict[int, int]]:
    """Names of the classes of an annotation file in the order of their ids, and the place of each id in it."""
    categories = sorted(whole["categories"], key=lambda category: category["id"])
    for category in categories:
        if not isinstance(category["name"], str):
            raise TypeError(f"the category {category['id']} is called {category['name']!r}")
    return [category["name"] for category in categories], {c["id"]: index for index, c in enumerate(categories)}


def require_few(names: list[str], source: Path) -> None:
    """Raises UserError where there are more classes than a label map has numbers for."""
    if len(names) >= UNLABELED:
        raise UserError(f"{source} has {len(names)} categories; at most {UNLABELED - 1} are supported")


def _plain(name: str, source: Path) -> str:
    if not name or PurePosixPath(name).name != name or "\\" in name or name == "..":
        raise UserError(f"{source} names the file {name!r}, which is not a plain file name; mend the file")
    return name
