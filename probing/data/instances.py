"""Reads COCO's instance annotations, the official JSON, as semantic label maps."""

import logging
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask

from probing.data.coco import ImageList, Skipped, same_shape
from probing.data.coco_annotations import Fault, Faults, read_annotation_file
from probing.data.image_modes import Size
from probing.data.panoptic import UNLABELED, Panoptic, class_of, read_classes, read_panoptic
from probing.utils.errors import UserError

logger = logging.getLogger(__name__)

LARGEST = 2**27
"""Most pixels of a label map."""
COMPRESSED = re.compile(rb"[0-o]*[0-O]")
"""Compressed run lengths: six bits a character, the highest of which says that a number continues in the next one."""
Outline = list[NDArray[np.float64]] | dict[str, Any]
"""Polygons, or pycocotools' compressed run lengths; arrays take a third of the memory of lists."""


@dataclass(frozen=True)
class Instances:
    """The instance annotations of one split.

    Attributes:
        names: class names; a class's label is its position in the order of category ids.
        sizes: by image file.
        objects: by image file, label and outline of its objects, the largest first; crowds are among them.
    """

    names: list[str]
    sizes: dict[str, Size]
    objects: dict[str, list[tuple[int, Outline]]]

    @property
    def images(self) -> Collection[str]:
        """File names of the images that have a label map."""
        return self.sizes.keys()

    def labels(self, image: str) -> NDArray[np.uint8]:
        """Returns the class of every pixel, (rows, columns); `UNLABELED` where there is none.

        Smaller objects cover larger ones.

        Raises:
            OSError: the annotated size is far too large.
        """
        columns, rows = self.sizes[image]
        if rows * columns > LARGEST:
            raise OSError(f"its annotated size is {columns} x {rows} pixels")
        labels = np.full((rows, columns), UNLABELED, dtype=np.uint8)
        for label, outline in self.objects.get(image, []):
            labels[mask.decode(_run_lengths(outline, rows, columns)).astype(bool)] = label
        return labels


def _run_lengths(outline: Outline, rows: int, columns: int) -> Any:
    return outline if isinstance(outline, dict) else mask.merge(mask.frPyObjects(outline, rows, columns))


def _checked(outline: Any, rows: int, columns: int, faults: Faults, name: str) -> Outline:
    """Checks an object's outline: pycocotools reads or writes beyond its memory if one is broken.

    Returns:
        Its valid polygons, or its run lengths, compressed.

    Raises:
        Fault: no polygon is valid, or the mask has another size than the image.
        ValueError, KeyError, TypeError, OverflowError: the run lengths are broken.
    """
    if isinstance(outline, dict):
        if list(outline.get("size", [rows, columns])) != [rows, columns]:
            raise Fault("masks of another size than their image", name)
        counts = outline["counts"]
        if isinstance(counts, str):
            counts = counts.encode()
        else:
            counts = mask.frPyObjects({"size": [rows, columns], "counts": counts}, rows, columns)["counts"]
        if not COMPRESSED.fullmatch(counts) or not _fills(counts, rows * columns):
            raise ValueError("the run lengths of a mask do not fill the image")
        return {"size": [rows, columns], "counts": counts}
    polygons = [np.array(polygon, np.float64) for polygon in outline if _is_polygon(polygon, 4 * max(rows, columns))]
    if not polygons:
        raise Fault("objects without an outline", name)
    if len(polygons) < len(outline):
        faults.add(Fault("parts of objects that are not polygons of three points or more", name))
    return polygons


def _fills(counts: bytes, pixels: int) -> bool:
    """Whether compressed run lengths cover that many pixels; pycocotools leaks a mask's memory where they do not.

    From the third on, each number is a difference from the one before the last, its lowest five bits first.
    """
    runs, value, shift = list[int](), 0, 0
    for character in counts:
        bits = character - ord("0")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return min(runs) >= 0 and sum(runs) == pixels


def _is_polygon(points: Any, farthest: float) -> bool:
    """Whether these are coordinates of three points or more, none of them far outside the image.

    pycocotools turns two points into a box, and draws every pixel on the way to a point far outside.
    """
    try:
        usable = len(points) >= 6 and len(points) % 2 == 0 and math.isfinite(sum(points))
        return usable and -farthest <= min(points) and max(points) <= farthest
    except (TypeError, OverflowError):
        return False


def read_instances(root: Path, split: str) -> Instances:
    """Reads `annotations/instances_<split>.json` of a folder in COCO's official layout.

    Unusable objects are skipped, counted and named.

    Raises:
        UserError: the file is missing or broken, or none of its objects is usable.
    """
    source = root / "annotations" / f"instances_{split}.json"
    file, faults = read_annotation_file(source, root / split), Faults(source)
    names, labels = read_classes(file.categories, faults)
    objects: dict[str, list[tuple[float, int, Outline]]] = {}

    def read(entry: Any) -> None:
        name = file.image_of(entry)
        if name not in file.sizes:
            raise Fault("objects of images without width and height", name)
        columns, rows = file.sizes[name]
        if rows * columns > LARGEST:
            raise Fault("objects of images that are far too large", name)
        label = class_of(entry, labels, name)
        outline = _checked(entry.get("segmentation") or [], rows, columns, faults, name)
        area = entry.get("area")
        if not isinstance(area, int | float) or not math.isfinite(area):
            area = float(mask.area(_run_lengths(outline, rows, columns)))
        objects.setdefault(name, []).append((area, label, outline))

    faults.each(read, file.annotations)
    faults.require(objects)
    ordered = {name: sorted(own, key=lambda one: -one[0]) for name, own in objects.items()}
    return Instances(names, file.sizes, {name: [(label, o) for _, label, o in own] for name, own in ordered.items()})


def read_label_maps(root: Path, split: str) -> Panoptic | Instances:
    """Reads the panoptic annotations of a split or, if there are none, the instances.

    Raises:
        UserError: there are neither, or they are broken.
    """
    if (root / "annotations" / f"panoptic_{split}.json").exists():
        return read_panoptic(root, split)
    if (root / "annotations" / f"instances_{split}.json").exists():
        return read_instances(root, split)
    raise UserError(
        f"{root / 'annotations'} has neither panoptic_{split}.json nor instances_{split}.json; put one there"
    )


@dataclass
class LabelledImages(ImageList):
    """Images that are skipped unless their label maps are readable, too."""

    maps: Panoptic | Instances | None = None

    def read(self, index: int) -> Image.Image:
        """Reads one image as RGB; raises OSError if it or its label map is corrupt, or their sizes differ."""
        image = super().read(index)
        if self.maps is not None:
            labels_on(self.maps, self.names[index], image.size)
        return image


def keep_annotated_size(images: ImageList, maps: Panoptic | Instances) -> ImageList:
    """Skips images that do not have their annotated size; logs how many label maps are scaled to their images.

    Raises:
        UserError: no image is left.
    """
    names, scaled, skipped = list[str](), list[str](), list[Skipped]()
    for name in images.names:
        size = images.sizes.get(name)
        if size is None or name not in maps.sizes:
            names.append(name)  # if it is unreadable, the dataloader reports it
            continue
        annotated = maps.sizes[name]
        if not same_shape(annotated, size):
            skipped.append(Skipped(name, images.split, _size_difference(annotated, size)))
            continue
        names.append(name)
        if annotated != size:
            scaled.append(name)
    if scaled:
        logger.warning("%s: %d label maps are scaled to their images, first %s", images.split, len(scaled), scaled[0])
    if skipped:
        first = f"{skipped[0].image}: {skipped[0].reason}"
        if not names:
            raise UserError(f"no image of {images.split} has its annotated size, first {first}; use published files")
        logger.warning("%s: %d images are skipped, first %s", images.split, len(skipped), first)
    return replace(images, names=names, skipped=images.skipped + skipped)


def _size_difference(annotated: Size, size: Size) -> str:
    return f"{annotated[0]} x {annotated[1]} pixels are annotated, the image has {size[0]} x {size[1]}"


def labels_on(maps: Panoptic | Instances, name: str, size: Size) -> NDArray[np.uint8]:
    """Reads an image's label map at the image's size.

    Returns:
        Class of every pixel, (rows, columns); in a resized image that of the nearest annotated pixel.

    Raises:
        OSError: the label map is unreadable, or its size is not the image's, scaled.
    """
    labels = maps.labels(name)
    annotated = labels.shape[1], labels.shape[0]
    if annotated == size:
        return labels
    if not same_shape(annotated, size):
        raise OSError(_size_difference(annotated, size))
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
