"""Pictures of the page: a strip per layer and checkpoint, to be gone through with a slider."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from reports.charts import PROBES
from reports.grids import DEPTH_COLOURS, MOST_ROWS, OTHER, Grid, class_colours, class_name, spread
from reports.results import RunResults, layer_rank, teacher_title

SIDES = (160, 128, 112, 96, 80, 64, 48)
"""Sides of a picture in the page, in pixels: the largest at which all of them fit."""
MOST_BYTES = 3_000_000
"""That all pictures of a page may take in it."""
QUALITY = 60
COARSE = 100
"""Below this side pixels are shown as they are."""


@dataclass(frozen=True)
class Viewer:
    """The strips of one teacher and kind of probe, of all runs that drew the same images.

    Attributes:
        title: teacher and probe.
        probe: kind of probe.
        layers: all that any run has, in order.
        printed: those that stand on paper, and in the page where no slider moves.
        top: name and strip of photographs and of the teacher's own pictures.
        rows: name and number of a checkpoint, with a strip per layer.
        classes: colour and name of the classes that have a colour, for segmentation.
        columns: images in a strip.
        coarse: whether pixels are to be shown as they are.
    """

    title: str
    probe: str
    layers: list[str]
    printed: list[str]
    top: list[tuple[str, str]]
    rows: list[tuple[str, int, dict[str, str]]]
    classes: list[tuple[str, str]]
    columns: int
    coarse: bool


def viewers(drawn: Sequence[tuple[RunResults, Sequence[Grid]]], most: int = MOST_BYTES) -> list[Viewer]:
    """Everything that was drawn, in pictures as large as the page has room for."""
    grouped: dict[tuple[str, str, str], list[tuple[RunResults, Grid]]] = {}
    for run, grids in drawn:
        for grid in grids:
            same = hashlib.sha256(grid.photographs.tobytes() + grid.own.tobytes()).hexdigest()
            grouped.setdefault((grid.probe, grid.teacher, same), []).append((run, grid))
    made: list[Viewer] = []
    for side in SIDES:
        some = [(_viewer([(run, _middle(grid))], side), found) for found in grouped.values() for run, grid in found[:1]]
        if side != SIDES[-1] and sum(_weight(viewer) * _strips(found) / 3 for viewer, found in some) > most:
            continue
        made = [_viewer(found, side) for found in grouped.values()]
        if sum(_weight(viewer) for viewer in made) <= most:
            break
    return sorted(made, key=lambda viewer: list(PROBES).index(viewer.probe))


def _middle(grid: Grid) -> Grid:
    """The layer in the middle alone, which tells about how many bytes a strip takes."""
    layer = list(grid.layers)[len(grid.layers) // 2]
    return replace(grid, layers={layer: grid.layers[layer]})


def _strips(found: Sequence[tuple[RunResults, Grid]]) -> int:
    return 2 + sum(len(grid.layers) for _, grid in found)


def _weight(viewer: Viewer) -> int:
    return sum(len(source) for _, source in viewer.top) + sum(len(s) for *_, row in viewer.rows for s in row.values())


def _viewer(found: Sequence[tuple[RunResults, Grid]], side: int) -> Viewer:
    first = found[0][1]
    colours = class_colours([grid for _, grid in found]) if first.teacher == "seg" else {}
    layers = sorted({layer for _, grid in found for layer in grid.layers}, key=layer_rank)

    def strip(pictures: NDArray[Any], plain: bool = False) -> str:
        return _strip(first, pictures, colours, side, plain)

    return Viewer(
        title=f"{teacher_title(first.teacher)}, {PROBES[first.probe]}",
        probe=first.probe,
        layers=layers,
        printed=spread(layers) if len(layers) > MOST_ROWS else layers,
        top=[("photograph", strip(first.photographs, plain=True)), ("teacher", strip(first.own))],
        rows=[(run.label, run.place, {k: strip(drawn) for k, drawn in grid.layers.items()}) for run, grid in found],
        classes=[(colour, class_name(first, label)) for label, colour in colours.items()],
        columns=len(first.photographs),
        coarse=first.own.shape[1] < COARSE,
    )


def _strip(grid: Grid, pictures: NDArray[Any], colours: dict[int, str], side: int, plain: bool) -> str:
    """Pictures side by side, as a data URI."""
    flat = not plain and grid.teacher == "seg"
    side = min(side, pictures.shape[1])
    parts = []
    for picture, own in zip(pictures, grid.own, strict=True):
        resampling = Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS
        depth = not plain and grid.teacher == "depth"
        image = Image.fromarray(picture.astype(np.float32) if depth else np.ascontiguousarray(picture))
        small = np.asarray(image.resize((side, side), resampling))
        parts.append(Image.fromarray(_coloured(grid, small, own, colours) if depth or flat else small))
    whole = Image.new("RGB", (side * len(parts), side))
    for place, part in enumerate(parts):
        whole.paste(part, (side * place, 0))
    buffer = io.BytesIO()
    if flat or pictures.shape[1] < COARSE:  # few colours, or few pixels that are seen one by one
        whole.save(buffer, format="webp", lossless=True, quality=50, method=3)
    else:
        whole.save(buffer, format="webp", quality=QUALITY, method=3)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _coloured(grid: Grid, picture: NDArray[Any], own: NDArray[Any], colours: dict[int, str]) -> NDArray[np.uint8]:
    if grid.teacher == "depth":
        scale = mpl.colors.Normalize(float(own.min()), float(own.max()), clip=True)
        drawn: NDArray[np.uint8] = mpl.colormaps[DEPTH_COLOURS](scale(picture.astype(np.float32)), bytes=True)[..., :3]
        return drawn
    table = np.tile(np.array(to_rgb(OTHER)), (256, 1))
    for label, colour in colours.items():
        table[label] = to_rgb(colour)
    return (255 * table[picture]).round().astype(np.uint8)
