"""COCO's instance annotations as semantic label maps, read from the official JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from probing.data.panoptic import UNLABELED, Panoptic, read_panoptic
from probing.errors import UserError


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
        found = np.full((rows, columns), UNLABELED, dtype=np.uint8)
        for number, outline in self.objects.get(image, []):
            try:
                encoded = outline
                if isinstance(outline, list):
                    encoded = rle.merge(rle.frPyObjects(outline, rows, columns))
                elif isinstance(outline["counts"], list):
                    encoded = rle.frPyObjects(outline, rows, columns)
                inside = rle.decode(encoded).astype(bool)
                found[inside] = number
            except (TypeError, ValueError, KeyError, IndexError) as error:
                raise OSError(f"broken outline of a {self.names[number]}: {error}") from None
        return found


def read_instances(root: Path, split: str) -> Instances:
    """Reads `annotations/instances_<split>.json` of a folder in COCO's official layout.

    Raises:
        UserError: the file is missing or broken.
    """
    source = root / "annotations" / f"instances_{split}.json"
    try:
        whole: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        categories = sorted(whole["categories"], key=lambda category: category["id"])
        number = {category["id"]: index for index, category in enumerate(categories)}
        files = {image["id"]: image["file_name"] for image in whole["images"]}
        sizes = {image["file_name"]: (int(image["height"]), int(image["width"])) for image in whole["images"]}
        objects: dict[str, list[tuple[int, Any]]] = {}
        for entry in sorted(whole["annotations"], key=lambda entry: -entry["area"]):
            objects.setdefault(files[entry["image_id"]], []).append(
                (number[entry["category_id"]], entry["segmentation"])
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source} is not an instance annotation file of COCO ({type(error).__name__}: {error}); download it again"
        ) from None
    if len(categories) >= UNLABELED:
        raise UserError(f"{source} has {len(categories)} categories; at most {UNLABELED - 1} are supported")
    return Instances([category["name"] for category in categories], sizes, objects)


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
