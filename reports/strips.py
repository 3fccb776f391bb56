"""Decoded images in the page: a strip per layer and checkpoint, selected with a slider."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reports.curves import PROBES, panel_title
from reports.grids import DEPTH_COLOURS, MAX_ROWS, Grid, class_colours, class_name, classes_rgb, sample_layers
from reports.results import RunResults, layer_rank

SIDES = (160, 128, 112, 96, 80, 64, 48)
"""Image sides in pixels; the largest at which all images fit is used."""
MAX_BYTES = 3_000_000
"""Maximal size of all images of a page."""
WEBP_QUALITY = 60
COARSE = 100
"""Images with a smaller side are shown without interpolation."""


@dataclass(frozen=True)
class Viewer:
    """The strips of one teacher and kind of probe, of all runs with the same images.

    Attributes:
        title: teacher and probe.
        probe: kind of probe.
        layers: layers of any of the runs, in order.
        print_layers: layers that are printed, and shown without JavaScript.
        top: name and strip of the photographs and of the decoded teacher.
        rows: name of a checkpoint, with a strip per layer.
        classes: colour and name of the coloured classes, for segmentation.
        columns: images in a strip.
        coarse: whether to show pixels without interpolation.
    """

    title: str
    probe: str
    layers: list[str]
    print_layers: list[str]
    top: list[tuple[str, str]]
    rows: list[tuple[str, dict[str, str]]]
    classes: list[tuple[str, str]]
    columns: int
    coarse: bool


def viewers(runs: Sequence[tuple[RunResults, Sequence[Grid]]]) -> list[Viewer]:
    """Builds the strips of all grids, with images as large as the page has room for."""
    grouped: dict[tuple[str, str, str], list[tuple[RunResults, Grid]]] = {}
    for run, grids in runs:
        for grid in grids:
            image_hash = hashlib.sha256(grid.photographs.tobytes() + grid.teacher_pictures.tobytes()).hexdigest()
            grouped.setdefault((grid.probe, grid.teacher, image_hash), []).append((run, grid))
    result: list[Viewer] = []
    for side in SIDES:
        samples = [
            (_viewer([(run, _middle_layer(grid))], side), 2 + sum(len(grid.layers) for _, grid in group))
            for group in grouped.values()
            for run, grid in group[:1]
        ]
        estimate = sum(_n_bytes(viewer) * n_strips / 3 for viewer, n_strips in samples)
        if side != SIDES[-1] and estimate > MAX_BYTES:
            continue
        result = [_viewer(group, side) for group in grouped.values()]
        if sum(map(_n_bytes, result)) <= MAX_BYTES:
            break
    return sorted(result, key=lambda viewer: list(PROBES).index(viewer.probe))


def _middle_layer(grid: Grid) -> Grid:
    """Keeps only the middle layer, to estimate the size of a strip."""
    layer = list(grid.layers)[len(grid.layers) // 2]
    return replace(grid, layers={layer: grid.layers[layer]})


def _n_bytes(viewer: Viewer) -> int:
    return sum(len(source) for _, source in viewer.top) + sum(len(s) for _, row in viewer.rows for s in row.values())


def _viewer(group: Sequence[tuple[RunResults, Grid]], side: int) -> Viewer:
    first = group[0][1]
    colours = class_colours([grid for _, grid in group]) if first.teacher == "seg" else {}
    layers = sorted({layer for _, grid in group for layer in grid.layers}, key=layer_rank)

    def strip(pictures: NDArray[Any], plain: bool = False) -> str:
        return _strip(first, pictures, colours, side, plain)

    return Viewer(
        title=panel_title(first.teacher, first.probe),
        probe=first.probe,
        layers=layers,
        print_layers=sample_layers(layers) if len(layers) > MAX_ROWS else layers,
        top=[("photograph", strip(first.photographs, plain=True)), ("teacher", strip(first.teacher_pictures))],
        rows=[(run.label, {k: strip(pictures) for k, pictures in grid.layers.items()}) for run, grid in group],
        classes=[(colour, class_name(first, label)) for label, colour in colours.items()],
        columns=len(first.photographs),
        coarse=first.teacher_pictures.shape[1] < COARSE,
    )


def _strip(grid: Grid, pictures: NDArray[Any], colours: dict[int, str], side: int, plain: bool) -> str:
    """Encodes images side by side as a WebP data URI."""
    flat = not plain and grid.teacher == "seg"
    side = min(side, pictures.shape[1])
    parts = []
    for picture, teacher in zip(pictures, grid.teacher_pictures, strict=True):
        resampling = Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS
        depth = not plain and grid.teacher == "depth"
        image = Image.fromarray(picture.astype(np.float32) if depth else np.ascontiguousarray(picture))
        small = np.asarray(image.resize((side, side), resampling))
        parts.append(Image.fromarray(_coloured(grid, small, teacher, colours) if depth or flat else small))
    whole = Image.new("RGB", (side * len(parts), side))
    for column, part in enumerate(parts):
        whole.paste(part, (side * column, 0))
    buffer = io.BytesIO()
    if flat or pictures.shape[1] < COARSE:  # few colours, or visible pixels
        whole.save(buffer, format="webp", lossless=True, quality=50, method=3)
    else:
        whole.save(buffer, format="webp", quality=WEBP_QUALITY, method=3)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _coloured(grid: Grid, picture: NDArray[Any], teacher: NDArray[Any], colours: dict[int, str]) -> NDArray[np.uint8]:
    if grid.teacher == "depth":
        scale = mpl.colors.Normalize(float(teacher.min()), float(teacher.max()), clip=True)
        coloured: NDArray[np.uint8] = mpl.colormaps[DEPTH_COLOURS](scale(picture.astype(np.float32)), bytes=True)[
            ..., :3
        ]
        return coloured
    return (255 * classes_rgb(picture, colours)).round().astype(np.uint8)
