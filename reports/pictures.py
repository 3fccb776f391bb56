"""Decoded images by layer, with photograph and teacher (OLA-VLM, Figs. VI–VIII): grids as files, strips in the page."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from analysis.evaluation.scores import ScoreFile, by_seed
from reports.curves import PROBES, panel_title
from reports.results import TEACHERS, RunResults, layer_rank
from reports.theme import style

MAX_ROWS = 12
"""Maximal number of layers in a file or in print; more are sampled evenly."""
CLASS_COLOURS = (
    *("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255"),
    *("#999933", "#AA4499", "#44AA99", "#661100", "#6699CC", "#EE8866"),
)
"""Colours of the largest classes, after Paul Tol's muted scheme; dark and light alternate for grey print."""
OTHER_COLOUR = "#808080"
"""Colour of all other classes."""
DEPTH_COLOURS = "magma"
"""Perceptually uniform colour map, ordered by lightness for grey print."""
SIDES = (160, 128, 112, 96, 80, 64, 48)
"""Sides of the page's images in pixels; the largest at which all images fit is used."""
MAX_BYTES = 3_000_000
"""Maximal size of all images of a page."""
COARSE = 100
"""Images with a smaller side are shown without interpolation, and stored without loss."""


@dataclass(frozen=True)
class Grid:
    """Decoded images of one teacher and kind of probe.

    Attributes:
        teacher: `depth`, `seg` or `gen`.
        probe: `resampler` or `ridge`.
        photographs: (columns, S, S, 3), uint8.
        teacher_pictures: the decoded teacher's feature, (columns, S, S) or (columns, S, S, 3).
        layers: the decoded probe's output, by layer, in order.
        classes: names of the classes, for seg.
    """

    teacher: str
    probe: str
    photographs: NDArray[np.uint8]
    teacher_pictures: NDArray[Any]
    layers: dict[str, NDArray[Any]]
    classes: list[str]

    def class_name(self, label: int) -> str:
        """Returns the name of a class, or its number if it has none."""
        return self.classes[label] if label < len(self.classes) else f"class {label}"


def read_grids(run: Path) -> list[Grid]:
    """Reads `pictures/` of a run; of several seeds the first."""
    grids = []
    for teacher in TEACHERS:
        for file in sorted((run / "pictures").glob(f"{teacher}-*.safetensors")):
            stored: dict[tuple[str, str], dict[str, NDArray[Any]]] = {}
            for key, seeds in by_seed(ScoreFile.read(file).table).items():
                stored.setdefault((key.probe, key.control), {})[key.layer] = seeds[min(seeds)]
            classes = file.with_name("classes.json")
            names = json.loads(classes.read_text(encoding="utf-8")) if teacher == "seg" and classes.exists() else []
            for probe in PROBES:
                if pictures := stored.get((probe, "none")):
                    photographs, target = (stored[kind, "teacher"][""] for kind in ("photograph", "target"))
                    grids.append(Grid(teacher, probe, photographs, target, pictures, names))
    return grids


def sample_layers(layers: list[str]) -> list[str]:
    """Samples at most `MAX_ROWS` layers evenly, including first and last."""
    if len(layers) <= MAX_ROWS:
        return layers
    return [layers[i] for i in np.linspace(0, len(layers) - 1, MAX_ROWS).round().astype(int)]


def class_colours(grids: Sequence[Grid]) -> dict[int, str]:
    """Assigns colours to the largest classes of segmentations; other teachers have none."""
    pictures = [p for grid in grids if grid.teacher == "seg" for p in (grid.teacher_pictures, *grid.layers.values())]
    counts = sum((np.bincount(picture.ravel(), minlength=256) for picture in pictures), np.zeros(256, dtype=np.int64))
    by_area = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    return dict(zip(sorted(by_area[: len(CLASS_COLOURS)]), CLASS_COLOURS, strict=False))


def coloured(grid: Grid, pictures: NDArray[Any], colours: dict[int, str]) -> list[NDArray[np.uint8]]:
    """Colours depth on the scale of the teacher's picture, and classes; (columns, S, S) → RGB. RGB stays as it is."""
    if pictures.ndim == 4:
        return list(pictures)
    if grid.teacher == "seg":
        table = np.array([to_rgb(colours.get(label, OTHER_COLOUR)) for label in range(256)])
        return list((255 * table).round().astype(np.uint8)[pictures])
    scales = [Normalize(float(teacher.min()), float(teacher.max()), clip=True) for teacher in grid.teacher_pictures]
    colour = mpl.colormaps[DEPTH_COLOURS]
    pairs = zip(scales, pictures.astype(np.float32), strict=True)
    return [colour(scale(picture), bytes=True)[..., :3] for scale, picture in pairs]


def layer_name(layer: str) -> str:
    """Returns the name of a layer in captions."""
    return f"layer {layer}" if layer.isdecimal() else layer


def grid_figure(grid: Grid) -> Figure:
    """Draws a grid with photograph, teacher and layers as rows, and images as columns."""
    layers, columns, colours = sample_layers(list(grid.layers)), len(grid.photographs), class_colours([grid])
    rows = {"photograph": grid.photographs, "teacher": grid.teacher_pictures}
    rows |= {layer_name(layer): grid.layers[layer] for layer in layers}
    with mpl.rc_context(style() | {"axes.grid": False}):
        figure = Figure(
            figsize=(1.25 * columns + 0.8, 1.25 * len(rows) + 0.7),
            layout=ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0),
        )
        grid_axes = figure.subplots(len(rows), columns, squeeze=False)
        for axes, (name, pictures) in zip(grid_axes, rows.items(), strict=True):
            for one, picture in zip(axes, coloured(grid, pictures, colours), strict=True):
                one.imshow(picture, interpolation="nearest" if len(picture) < COARSE else "antialiased")
                one.set(xticks=[], yticks=[], frame_on=False)
            axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
        if grid.teacher == "depth":
            scale = mpl.cm.ScalarMappable(Normalize(0, 1), DEPTH_COLOURS)
            bar = figure.colorbar(scale, ax=grid_axes, location="bottom", shrink=0.6, aspect=30, ticks=[0, 1])
            bar.set_ticklabels(["far", "near"])
            bar.set_label("scale of the teacher, per column")
        if colours:
            handles = [Patch(color=colour, label=grid.class_name(label)) for label, colour in colours.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, 4), frameon=False)
    return figure


def viewers(runs: Sequence[tuple[RunResults, Sequence[Grid]]]) -> list[dict[str, Any]]:
    """Builds a viewer for each teacher and probe, with the runs of the same images, as large as the page has room for.

    Returns:
        For the template: `title`, `probe`, `layers`, `print_layers`, `top` (name and strip of photographs and teacher),
        `rows` (name of a checkpoint, strips by layer), `classes` (colour and name), `columns` and `coarse`.
    """
    groups: dict[tuple[str, str, str], list[tuple[str, Grid]]] = {}
    for run, grids in runs:
        for grid in grids:
            images = hashlib.sha256(grid.photographs.tobytes() + grid.teacher_pictures.tobytes()).hexdigest()
            groups.setdefault((grid.probe, grid.teacher, images), []).append((run.label, grid))
    ordered = sorted(groups.values(), key=lambda group: list(PROBES).index(group[0][1].probe))
    for side in SIDES:
        samples = [_strip(group[0][1], _middle(group[0][1]), class_colours([group[0][1]]), side) for group in ordered]
        counts = [2 + sum(len(grid.layers) for _, grid in group) for group in ordered]
        estimate = sum(len(sample) * count for sample, count in zip(samples, counts, strict=True))
        if side != SIDES[-1] and estimate > MAX_BYTES:
            continue
        found = [_viewer(group, side) for group in ordered]
        strips = [strip for viewer in found for _, row in viewer["rows"] for strip in row.values()]
        if sum(map(len, strips)) <= MAX_BYTES:
            break
    return found


def _middle(grid: Grid) -> NDArray[Any]:
    return list(grid.layers.values())[len(grid.layers) // 2]


def _viewer(group: Sequence[tuple[str, Grid]], side: int) -> dict[str, Any]:
    first = group[0][1]
    colours = class_colours([grid for _, grid in group])
    layers = sorted({layer for _, grid in group for layer in grid.layers}, key=layer_rank)
    top = {"photograph": first.photographs, "teacher": first.teacher_pictures}
    return {
        "title": panel_title(first.teacher, first.probe),
        "probe": first.probe,
        "layers": [(layer, layer_name(layer)) for layer in layers],
        "print_layers": sample_layers(layers),
        "top": [(name, _strip(first, pictures, colours, side)) for name, pictures in top.items()],
        "rows": [
            (label, {k: _strip(first, p, colours, side) for k, p in grid.layers.items()}) for label, grid in group
        ],
        "classes": [(colour, first.class_name(label)) for label, colour in colours.items()],
        "columns": len(first.photographs),
        "coarse": first.teacher_pictures.shape[1] < COARSE,
    }


def _strip(grid: Grid, pictures: NDArray[Any], colours: dict[int, str], side: int) -> str:
    """Encodes images side by side as a WebP data URI."""
    side, flat = min(side, pictures.shape[1]), pictures.ndim == 3 and grid.teacher == "seg"
    whole = Image.new("RGB", (side * len(pictures), side))
    for column, picture in enumerate(coloured(grid, pictures, colours)):
        resampling = Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS
        whole.paste(Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), resampling), (side * column, 0))
    buffer, lossless = io.BytesIO(), flat or pictures.shape[1] < COARSE  # few colours, or visible pixels
    whole.save(buffer, format="webp", lossless=lossless, quality=50 if lossless else 60, method=3)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
