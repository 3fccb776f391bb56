"""Images and depth pairs of a folder in DA-2K's layout (Depth Anything V2, arXiv:2406.09414, sec. 6)."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from probing.errors import BROKEN, UserError

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
    """Reads `annotations.json`.

    Args:
        root: folder that holds `annotations.json` and, below it, the images that it names.

    Returns:
        Pairs by image path relative to the root, in the file's order.

    Raises:
        UserError: the file is missing or broken, or names a path outside its root.
    """
    source = root / "annotations.json"
    if not source.is_file():
        raise UserError(f"no annotations.json in {root}; give da2k:DIR, a folder in DA-2K's layout")
    try:
        entries: dict[str, list[dict[str, Any]]] = json.loads(source.read_text(encoding="utf-8"))
        return {_plain(name, source): [_pair(entry) for entry in pairs] for name, pairs in entries.items()}
    except BROKEN as error:
        raise UserError(
            f"{source} is not an annotation file of DA-2K ({type(error).__name__}: {error}); download it again"
        ) from None


def _plain(name: str, source: Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{source} names the image {name!r}, which is not a plain path below its root; mend the file")
    return name


def _pair(entry: dict[str, Any]) -> Pair:
    points = {name: (int(entry[name][0]), int(entry[name][1])) for name in ("point1", "point2")}
    closer = entry["closer_point"]
    if closer not in points:
        raise ValueError(f"closer_point is {closer!r}, not point1 or point2")
    return Pair(points[closer], points["point2" if closer == "point1" else "point1"])
