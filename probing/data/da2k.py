"""Images and depth pairs of a folder in DA-2K's layout (Depth Anything V2, arXiv:2406.09414, sec. 6)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probing.data.annotation_file import Faults, relative_name
from probing.utils.errors import BROKEN, UserError

Point = tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """Two points (row, column), the closer one first."""

    closer: Point
    farther: Point

    def inside(self, rows: int, columns: int) -> bool:
        """Whether both points lie in an image of that size."""
        return all(0 <= row < rows and 0 <= column < columns for row, column in (self.closer, self.farther))


def read_pairs(root: Path) -> dict[str, list[Pair]]:
    """Reads `annotations.json`; pairs and images that are broken are left out, counted and named.

    Args:
        root: folder that holds `annotations.json` and, below it, the images that it names.

    Returns:
        Pairs by image path relative to the root, in the file's order.

    Raises:
        UserError: the file is missing or broken, or none of its pairs can be used.
    """
    source = root / "annotations.json"
    if not source.is_file():
        raise UserError(f"no annotations.json in {root}; give da2k:DIR, a folder in DA-2K's layout")
    try:
        entries: dict[str, list[dict[str, Any]]] = json.loads(source.read_text(encoding="utf-8"))
        listed = list(entries.items())
    except BROKEN as error:
        raise UserError(
            f"{source} is not an annotation file of DA-2K ({type(error).__name__}: {error}); download it again"
        ) from None
    faults, found = Faults(source), dict[str, list[Pair]]()
    for name, pairs in listed:
        try:
            own = found.setdefault(relative_name(name), [])
            for entry in pairs:
                try:
                    own.append(_pair(entry))
                except BROKEN as error:
                    faults.add(error)
        except BROKEN as error:
            faults.add(error)
    faults.require(any(found.values()))
    return found


def _pair(entry: dict[str, Any]) -> Pair:
    points = {name: (int(entry[name][0]), int(entry[name][1])) for name in ("point1", "point2")}
    closer = entry["closer_point"]
    if closer not in points:
        raise ValueError(f"closer_point is {closer!r}, not point1 or point2")
    return Pair(points[closer], points["point2" if closer == "point1" else "point1"])
