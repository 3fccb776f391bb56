"""COCO's instance annotations as semantic label maps, read from the official JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from probing.data.panoptic import UNLABELED, Panoptic, read_classes, read_panoptic, require_few
from probing.errors import BROKEN, UserError

LARGEST = 2**27
"""Most pixels of a label map."""


@dataclass(frozen=True)
class Instances:
    """The instance annotations of one split.

    Attributes:
        names: class names; a class's number is its place by category id.
        sizes: per image file its rows and columns.
        objects: per image file, class and outline of its objects, the largest first; crowds are among them.
    """

    names: list[str]
    sizes: dict[str, tuple[int, int]]
    objects: dict[str, list[tuple[int, Any]]]

    def labels(self, image: str) -> NDArray[np.uint8]:
        """Class of every pixel, (rows, columns); `UNLABELED` where there is none. Smaller objects lie on larger ones.

        Raises:
            OSError: an outline is broken.
        """
        rows, columns = self.sizes[image]
        if rows < 1 or columns < 1 or rows * columns > LARGEST:
            raise OSError(f"its annotated size is {columns} x {rows} pixels")
        found = np.full((rows, columns), UNLABELED, dtype=np.uint8)
        for number, outline in self.objects.get(image, []):
            try:
                if isinstance(outline, list):
                    _require_near(outline, max(rows, columns))
                    inside = rle.decode(rle.merge(rle.frPyObjects(outline, rows, columns))).astype(bool)
                else:
                    inside = _mask(outline, rows, columns)
                found[inside] = number
            except BROKEN as error:
                raise OSError(f"broken outline of a {self.names[number]}: {error}") from None
        return found


def _require_near(polygons: list[Any], side: int) -> None:
    """Raises ValueError where a point is far outside the image: pycocotools would draw all the way to it."""
    for polygon in map(np.asarray, polygons):
        if polygon.ndim != 1 or polygon.size < 4 or polygon.dtype.kind not in "iuf":
            raise ValueError("a polygon is no list of four numbers or more")
        if not (np.abs(polygon) <= 4 * side).all():
            raise ValueError("a point is far outside the image")


def _mask(outline: dict[str, Any], rows: int, columns: int) -> NDArray[np.bool_]:
    """A mask from its runs, outside and inside in turn, down the columns; raises ValueError where they do not fit.

    Not by pycocotools, which writes beyond its memory where compressed runs are broken.
    """
    runs = outline["counts"]
    runs = np.asarray(_uncompressed(runs) if isinstance(runs, str) else runs)
    if runs.dtype.kind != "i" or runs.ndim != 1 or runs.min() < 0 or runs.sum() != rows * columns:
        raise ValueError("the runs of its mask do not fill the image")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(columns, rows).T


def _uncompressed(text: str) -> list[int]:
    """COCO's compressed runs: five bits a character, least first, and from the third on the difference of every second.

    See `rleFrString` in pycocotools.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return runs


def read_instances(root: Path, split: str) -> Instances:
    """Reads `annotations/instances_<split>.json` of a folder in COCO's official layout.

    Raises:
        UserError: the file is missing or broken.
    """
    source = root / "annotations" / f"instances_{split}.json"
    try:
        whole: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        names, number = read_classes(whole)
        files = {image["id"]: image["file_name"] for image in whole["images"]}
        sizes = {image["file_name"]: (int(image["height"]), int(image["width"])) for image in whole["images"]}
        objects: dict[str, list[tuple[int, Any]]] = {}
        for entry in sorted(whole["annotations"], key=lambda entry: -entry["area"]):
            objects.setdefault(files[entry["image_id"]], []).append(
                (number[entry["category_id"]], entry["segmentation"])
            )
    except BROKEN as error:
        raise UserError(
            f"{source} is not an instance annotation file of COCO ({type(error).__name__}: {error}); download it again"
        ) from None
    require_few(names, source)
    return Instances(names, sizes, objects)


def read_label_maps(root: Path, split: str) -> Panoptic | Instances:
    """What is where in the images of a split: panoptic annotations, or where there are none, instances.

    Raises:
        UserError: there are neither, or they are broken.
    """
    if (root / "annotations" / f"panoptic_{split}.json").exists():
        return read_panoptic(root, split)
    if (root / "annotations" / f"instances_{split}.json").exists():
        return read_instances(root, split)
    raise UserError(
        f"{root / 'annotations'} has neither panoptic_{split}.json nor instances_{split}.json, which say what is "
        "where; put one there"
    )
