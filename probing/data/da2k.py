"""Reads images and depth pairs of a folder in DA-2K's layout (Depth Anything V2, arXiv:2406.09414, sec. 6)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probing.data.coco_annotations import Faults
from probing.utils.errors import BROKEN, UserError
from probing.utils.paths import path_below

Point = tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """Two points (row, column), the closer one first."""

    closer: Point
    farther: Point

    def inside(self, rows: int, columns: int) -> bool:
        """Whether both points are in an image of that size."""
        return all(0 <= row < rows and 0 <= column < columns for row, column in (self.closer, self.farther))


def read_pairs(root: Path) -> dict[str, list[Pair]]:
    """Reads `annotations.json`; broken pairs and images are skipped, counted and named.

    Returns:
        Pairs by image path relative to the root, in the file's order.

    Raises:
        UserError: the file is missing, broken, or has no usable pair.
    """
    source = root / "annotations.json"
    if not source.is_file():
        raise UserError(f"no annotations.json in {root}; give da2k:DIR, a folder in DA-2K's layout")
    try:
        images = list(json.loads(source.read_text(encoding="utf-8")).items())
    except BROKEN as error:
        raise UserError(
            f"{source} is not a DA-2K annotation file ({type(error).__name__}: {error}); download it again"
        ) from None
    faults, pairs = Faults(source), dict[str, list[Pair]]()

    def read(item: tuple[str, Any]) -> None:
        own = pairs.setdefault(path_below(item[0]), [])
        faults.each(lambda entry: own.append(_pair(entry)), item[1])

    faults.each(read, images)
    faults.require(any(pairs.values()))
    return pairs


def _pair(entry: dict[str, Any]) -> Pair:
    points = {name: (int(entry[name][0]), int(entry[name][1])) for name in ("point1", "point2")}
    closer = entry["closer_point"]
    if closer not in points:
        raise ValueError(f"closer_point is {closer!r}, not point1 or point2")
    return Pair(points[closer], points["point2" if closer == "point1" else "point1"])
