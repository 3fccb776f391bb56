"""COCO's instance annotations as semantic label maps, read from the official JSON."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from probing.data.annotation_file import Fault, Faults, Size, read_annotation_file
from probing.data.coco import ImageList, Skipped, image_size, same_shape
from probing.data.panoptic import UNLABELED, Panoptic, class_of, read_classes, read_panoptic, require_few
from probing.utils.errors import BROKEN, UserError

logger = logging.getLogger(__name__)

LARGEST = 2**27
"""Most pixels of a label map."""
Outline = list[list[float]] | dict[str, Any]
"""Polygons, or pycocotools' compressed runs."""


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
    objects: dict[str, list[tuple[int, Outline]]]

    def labels(self, image: str) -> NDArray[np.uint8]:
        """Class of every pixel, (rows, columns); `UNLABELED` where there is none. Smaller objects lie on larger ones.

        Raises:
            OSError: the annotated size is absurd.
        """
        rows, columns = self.sizes[image]
        if rows * columns > LARGEST:
            raise OSError(f"its annotated size is {columns} x {rows} pixels")
        found = np.full((rows, columns), UNLABELED, dtype=np.uint8)
        for number, outline in self.objects.get(image, []):
            found[rle.decode(_runs(outline, rows, columns)).astype(bool)] = number
        return found


def _runs(outline: Outline, rows: int, columns: int) -> dict[str, Any]:
    """Draws polygons; runs stay as they are."""
    if isinstance(outline, dict):
        return outline
    drawn: dict[str, Any] = rle.merge(rle.frPyObjects(outline, rows, columns))
    return drawn


def _checked(outline: Any, rows: int, columns: int, faults: Faults, name: str) -> Outline:
    """Checks what an object's outline is, since pycocotools writes beyond its memory where one is broken.

    Returns:
        Its polygons that can be drawn, or its runs compressed.

    Raises:
        Fault: nothing can be drawn.
        ValueError, KeyError, TypeError: the runs are broken.
    """
    if isinstance(outline, dict):
        if list(outline.get("size", [rows, columns])) != [rows, columns]:
            raise Fault("masks of another size than their image", name)
        runs = _fitting_runs(outline["counts"], rows * columns)
        compressed: dict[str, Any] = rle.frPyObjects({"size": [rows, columns], "counts": runs}, rows, columns)
        return compressed
    polygons = [polygon for polygon in outline if _is_polygon(polygon, 4 * max(rows, columns))]
    if not polygons:
        raise Fault("objects without an outline", name)
    if len(polygons) < len(outline):
        faults.add(Fault("parts of objects that are no polygons of three points or more", name))
    return polygons


def _is_polygon(points: Any, farthest: float) -> bool:
    """Whether these are the coordinates of three points or more, none of them far outside the image.

    Of two points pycocotools would make a box, and it would draw all the way to a point that is far outside.
    """
    try:
        usable = len(points) >= 6 and len(points) % 2 == 0 and math.isfinite(sum(points))
        return usable and -farthest <= min(points) and max(points) <= farthest
    except (TypeError, OverflowError):
        return False


def _fitting_runs(counts: Any, pixels: int) -> list[int]:
    """Reads a mask's runs, outside and inside in turn, down the columns; raises ValueError where they do not fit."""
    runs = np.asarray(_uncompressed(counts) if isinstance(counts, str) else counts)
    if runs.dtype.kind != "i" or runs.ndim != 1 or runs.min() < 0 or runs.sum() != pixels:
        raise ValueError("the runs of a mask do not fill the image")
    return [int(run) for run in runs]


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

    Objects that cannot be used are left out, counted and named.

    Raises:
        UserError: the file is missing or broken, or none of its objects can be used.
    """
    source = root / "annotations" / f"instances_{split}.json"
    file, faults = read_annotation_file(source, root / split), Faults(source)
    names, number = read_classes(file.whole, faults)
    require_few(names, source)
    sizes = {name: (height, width) for name, (width, height) in file.sizes.items()}
    found: dict[str, list[tuple[float, int, Outline]]] = {}
    for entry in file.whole.get("annotations", []):
        try:
            name = file.image_of(entry)
            if name not in sizes:
                raise Fault("objects of images without width and height", name)
            if math.prod(sizes[name]) > LARGEST:
                raise Fault("objects of images of an absurd size", name)
            kind = class_of(entry, number, name)
            outline = _checked(entry.get("segmentation") or [], *sizes[name], faults, name)
            found.setdefault(name, []).append((_area(entry, outline, sizes[name]), kind, outline))
        except BROKEN as error:
            faults.add(error)
    faults.require(found)
    objects = {
        name: [(kind, outline) for _, kind, outline in sorted(own, key=lambda one: -one[0])]
        for name, own in found.items()
    }
    return Instances(names, sizes, objects)


def _area(entry: Mapping[str, Any], outline: Outline, size: tuple[int, int]) -> float:
    """Reads an object's area; counts its pixels where that is missing."""
    area = entry.get("area")
    if isinstance(area, int | float) and math.isfinite(area):
        return area
    return float(rle.area(_runs(outline, *size)))


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


@dataclass
class LabelledImages(ImageList):
    """Images that are read only where their label maps can be read, too."""

    maps: Panoptic | Instances | None = None

    def read(self, index: int) -> Image.Image:
        """One image as RGB; raises OSError where it or its label map is corrupt, or the sizes do not fit."""
        picture = super().read(index)
        if self.maps is not None:
            labels_on(self.maps, self.names[index], picture.size)
        return picture


def fitting(images: ImageList, maps: Panoptic | Instances) -> ImageList:
    """Leaves out the images that are not of their annotated size, and logs how many label maps are scaled to theirs.

    Raises:
        UserError: no image is left.
    """
    names, scaled, skipped = [], [], []
    for name in images.names:
        rows_columns = maps.sizes.get(name)
        try:
            size = image_size(images.folder / name, name in images.turned)
        except OSError:
            rows_columns = None  # the loader reads it again, and notes why it is left out
        if rows_columns is None or rows_columns[::-1] == size:
            names.append(name)
        elif same_shape(rows_columns[::-1], size):
            names.append(name)
            scaled.append(name)
        else:
            skipped.append(Skipped(name, images.split, _other_size(rows_columns[::-1], size)))
    if scaled:
        logger.warning("%s: %d label maps are scaled to their images, first %s", images.split, len(scaled), scaled[0])
    if skipped:
        first = f"{skipped[0].image}: {skipped[0].reason}"
        if not names:
            raise UserError(f"no image of {images.split} is of its annotated size, first {first}")
        logger.warning("%s: %d images are left out, first %s", images.split, len(skipped), first)
    return replace(images, names=names, skipped=images.skipped + skipped)


def _other_size(annotated: Size, size: Size) -> str:
    return f"{annotated[0]} x {annotated[1]} pixels are annotated, the image has {size[0]} x {size[1]}"


def labels_on(maps: Panoptic | Instances, name: str, size: Size) -> NDArray[np.uint8]:
    """Reads an image's label map at the image's own size.

    Args:
        maps: of its split.
        name: of the image.
        size: width and height of the image as models see it.

    Returns:
        Class of every pixel, (rows, columns); of a resized copy that of the nearest annotated one.

    Raises:
        OSError: the label map cannot be read, or its size is not the image's, scaled.
    """
    labels = maps.labels(name)
    annotated = labels.shape[1], labels.shape[0]
    if annotated == size:
        return labels
    if not same_shape(annotated, size):
        raise OSError(_other_size(annotated, size))
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
