"""Grids of decoded images by layer, below photograph and teacher (OLA-VLM, Figs. VI–VIII)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray

from analysis.evaluation.scores import ScoreFile, by_seed
from reports.theme import style

MAX_ROWS = 12
"""Maximal number of layers in a grid; more are sampled evenly."""
CLASS_COLOURS = (
    *("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255"),
    *("#999933", "#AA4499", "#44AA99", "#661100", "#6699CC", "#EE8866"),
)
"""Colours of the largest classes, after Paul Tol's muted scheme; dark and light alternate for grey print."""
OTHER_COLOUR = "#808080"
"""Colour of all other classes."""
DEPTH_COLOURS = "magma"
"""Perceptually uniform colour map, ordered by lightness for grey print."""
OVERLAY = 0.6
"""Opacity of class colours over the photograph."""


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


def read_grids(run: Path) -> list[Grid]:
    """Reads `pictures/` of a run; of several seeds the first."""
    grids = []
    for teacher in ("depth", "seg", "gen"):
        for file in sorted((run / "pictures").glob(f"{teacher}-*.safetensors")):
            stored: dict[tuple[str, str], dict[str, NDArray[Any]]] = {}
            for key, seeds in by_seed(ScoreFile.read(file).table).items():
                stored.setdefault((key.probe, key.control), {})[key.layer] = seeds[min(seeds)]
            classes = file.with_name("classes.json")
            names = json.loads(classes.read_text(encoding="utf-8")) if teacher == "seg" and classes.exists() else []
            for probe in ("resampler", "ridge"):
                if pictures := stored.get((probe, "none")):
                    photographs, target = (stored[kind, "teacher"][""] for kind in ("photograph", "target"))
                    grids.append(Grid(teacher, probe, photographs, target, pictures, names))
    return grids


def sample_layers(layers: list[str]) -> list[str]:
    """Samples at most `MAX_ROWS` layers evenly, including first and last."""
    if len(layers) <= MAX_ROWS:
        return layers
    return [layers[i] for i in np.linspace(0, len(layers) - 1, MAX_ROWS).round().astype(int)]


def grid_figure(grid: Grid) -> Figure:
    """Draws a grid with photograph, teacher and layers as rows, and images as columns."""
    rows: list[tuple[str, NDArray[Any]]] = [("photograph", grid.photographs), ("teacher", grid.teacher_pictures)]
    rows += [
        (f"layer {layer}" if layer.isdecimal() else layer, grid.layers[layer])
        for layer in sample_layers(list(grid.layers))
    ]
    columns = len(grid.photographs)
    colours = class_colours([grid]) if grid.teacher == "seg" else {}
    with mpl.rc_context(style() | {"axes.grid": False}):
        figure = Figure(
            figsize=(1.25 * columns + 0.8, 1.25 * len(rows) + 0.7),
            layout=ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0),
        )
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, (name, pictures) in enumerate(rows):
            for column in range(columns):
                _draw(axes[row, column], grid, pictures[column], column, colours, plain=row == 0)
            axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
        if grid.teacher == "depth":
            bar = figure.colorbar(
                mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), DEPTH_COLOURS),
                ax=axes, location="bottom", shrink=0.6, aspect=30, ticks=[0, 1],
            )  # fmt: skip
            bar.set_ticklabels(["far", "near"])
            bar.set_label("scale of the teacher, per column")
        if colours:
            handles = [Patch(color=colour, label=class_name(grid, label)) for label, colour in colours.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, 4), frameon=False)
    return figure


def class_name(grid: Grid, label: int) -> str:
    """Returns the name of a class, or its number if it has none."""
    return grid.classes[label] if label < len(grid.classes) else f"class {label}"


def class_colours(grids: Sequence[Grid]) -> dict[int, str]:
    """Assigns colours to the largest classes."""
    counts = np.zeros(256, dtype=np.int64)
    for grid in grids:
        for picture in (grid.teacher_pictures, *grid.layers.values()):
            counts += np.bincount(picture.ravel(), minlength=256)
    by_area = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    largest = sorted(by_area[: len(CLASS_COLOURS)])
    return dict(zip(largest, CLASS_COLOURS, strict=False))


def classes_rgb(labels: NDArray[np.uint8], colours: dict[int, str]) -> NDArray[np.float64]:
    """Colours a label map, (rows, columns) → (rows, columns, 3), 0 to 1."""
    table = np.array([to_rgb(colours.get(label, OTHER_COLOUR)) for label in range(256)])
    return table[labels]


def _draw(axes: Axes, grid: Grid, picture: NDArray[Any], column: int, colours: dict[int, str], plain: bool) -> None:
    interpolation = "nearest" if picture.shape[0] < 128 else "antialiased"
    if plain or grid.teacher == "gen":
        axes.imshow(picture, interpolation=interpolation)
    elif grid.teacher == "depth":
        teacher = grid.teacher_pictures[column].astype(np.float32)
        axes.imshow(
            picture.astype(np.float32),
            cmap=DEPTH_COLOURS,
            vmin=teacher.min(),
            vmax=teacher.max(),
            interpolation=interpolation,
        )
    else:
        overlay = OVERLAY * classes_rgb(picture, colours) + (1 - OVERLAY) * grid.photographs[column] / 255
        axes.imshow(overlay, interpolation=interpolation)
    axes.set(xticks=[], yticks=[], frame_on=False)
