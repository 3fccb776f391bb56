"""The chapter on patches and words: what the projector compresses, and which words the patches are near."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file

from probing.errors import UserError
from reports.curves import COLOURS, MARKERS, STYLE
from reports.results import AVERAGE, FINAL

TOWER = "tower"
"""What `results.csv` calls the tokens before the projector."""
COMPRESSION = {
    "von_neumann_entropy": "von Neumann entropy (nats)",
    "matrix_entropy": "matrix entropy, order 2 (nats)",
    "effective_rank": "effective rank, centred",
    "effective_rank_singular": "effective rank of singular values",
    "anisotropy": "anisotropy (mean cosine of two tokens)",
}
WORDS = {
    "word_cosine": "cosine with the label's word",
    "word_retrieval": "nearest word is the label's",
    "word_miou": "mIoU of the nearest words",
}
VARIANTS = {"centred": "means taken from patches and words", "raw": "as they are"}
CONTROL = {"color": "#8a8a8a", "linestyle": ":", "linewidth": 1.3}


@dataclass(frozen=True)
class AlignmentResults:
    """One run of `probing align`.

    Attributes:
        label: name for legends, unique among the runs of a report.
        path: its folder.
        results: `results.csv`, with `layer` as text.
        manifest: what it was made of.
    """

    label: str
    path: Path
    results: pd.DataFrame
    manifest: dict[str, Any]

    def curve(self, metric: str, control: str = "no", protocol: str | None = None) -> pd.DataFrame:
        """One curve in the order of the layers, the tower first; empty where this was not measured."""
        r = self.results
        chosen = r[(r["metric"] == metric) & (r["control"] == control) & (r["layer"] != AVERAGE)]
        if protocol is not None:
            chosen = chosen[chosen["protocol"] == protocol]
        return chosen.iloc[chosen["layer"].map(_rank).argsort(kind="stable")]


def _rank(layer: str) -> float:
    return {TOWER: -1.0, FINAL: float("inf")}.get(layer) or float(layer)


def load_alignments(paths: Sequence[Path]) -> list[AlignmentResults]:
    """Reads finished runs of `probing align`.

    Raises:
        UserError: one has no results.
    """
    found = []
    for path in paths:
        if not (path / "results.csv").exists():
            raise UserError(f"{path} has no results; type the probing align that made it once more")
        results = pd.read_csv(path / "results.csv", dtype={"layer": str, "seed": str}, keep_default_na=False)
        found.append((path, results, json.loads((path / "manifest.json").read_text(encoding="utf-8"))))
    names = [manifest["checkpoint"]["name"] for *_, manifest in found]
    return [
        AlignmentResults(f"{name} ({path.resolve().name})" if names.count(name) > 1 else name, path, results, manifest)
        for name, (path, results, manifest) in zip(names, found, strict=True)
    ]


def _draw(axes: Axes, curve: pd.DataFrame, layers: Sequence[str], **style: Any) -> None:
    """One line with its interval, by place in the list of layers."""
    x = np.array([layers.index(layer) for layer in curve["layer"]], dtype=float)
    if len(x):
        axes.plot(x, curve["value"], markersize=4, **style)
        axes.fill_between(x, curve["ci_low"], curve["ci_high"], color=style["color"], alpha=0.18, linewidth=0)


def _ticks(axes: Axes, layers: Sequence[str]) -> None:
    step = max(1, int(np.ceil(len(layers) / 9)))
    places = list(range(len(layers)))[::step]
    axes.set_xticks(places, [layers[place] for place in places])
    axes.set_xlabel("LLM layer (0 = projector output)")


def _layers(runs: Sequence[AlignmentResults], metrics: Sequence[str]) -> list[str]:
    there = {layer for run in runs for metric in metrics for layer in run.curve(metric)["layer"]}
    return sorted(there, key=_rank)


def compression_figure(runs: Sequence[AlignmentResults], metric: str) -> Figure:
    """How few directions an image's tokens use, from the tower on; a line per checkpoint."""
    layers = _layers(runs, [metric])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            _draw(axes, run.curve(metric), layers, label=run.label, **style)
        axes.set_ylabel(COMPRESSION[metric])
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.0))
        _ticks(axes, layers)
        if len(runs) > 1:
            axes.legend(frameon=False)
    return figure


def words_figure(runs: Sequence[AlignmentResults], metric: str, variant: str) -> Figure:
    """How well patches match the words of what they show, with permuted labels and a random projector beside it."""
    layers = _layers(runs, list(WORDS))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            _draw(axes, run.curve(metric, "no", variant), layers, label=run.label, color=colour, marker=marker)
            permuted = run.curve(metric, "permuted", variant)
            _draw(axes, permuted, layers, label="permuted labels" if index == 0 else None, **CONTROL)
            fresh = run.curve(metric, "random", variant)
            if len(fresh):
                name = "random projector" if index == 0 else None
                axes.plot(layers.index("0"), fresh["value"].iloc[0], "x", color="#333333", label=name)
        axes.set_ylabel(WORDS[metric])
        _ticks(axes, layers)
        axes.legend(frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class PatchPicture:
    """One image, and what its patches are near.

    Attributes:
        name: of the image.
        photograph: (S, S, 3), uint8.
        grid: rows and columns of the patches.
        labels: the classes that cover most of it.
        words: by layer, the nearest words of every patch.
        similarity: by layer, the centred cosine of every patch with each label, (patches, labels).
    """

    name: str
    photograph: NDArray[np.uint8]
    grid: tuple[int, int]
    labels: list[str]
    words: dict[str, list[list[str]]]
    similarity: dict[str, NDArray[Any]]


def read_pictures(run: Path) -> list[PatchPicture]:
    """Reads `pictures/patches.*` of a run; empty where none were kept."""
    source = run / "pictures" / "patches.json"
    if not source.exists():
        return []
    whole = json.loads(source.read_text(encoding="utf-8"))
    tensors = load_file(source.with_suffix(".safetensors"))
    rows, columns = whole["grid"]
    return [
        PatchPicture(
            name=entry["image"],
            photograph=tensors[f"photograph.{number}"],
            grid=(rows, columns),
            labels=entry["labels"],
            words=entry["words"],
            similarity={layer: tensors[f"similarity.{number}.{layer}"] for layer in whole["layers"]},
        )
        for number, entry in enumerate(whole["images"])
    ]


def similarity_figure(picture: PatchPicture) -> Figure:
    """Photograph, and for every label and layer how near each patch is to the label's word."""
    layers, rows = list(picture.similarity), len(picture.labels)
    most = max(float(np.abs(values).max()) for values in picture.similarity.values()) or 1.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * (len(layers) + 1), 1.55 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, len(layers) + 1, squeeze=False)
        for row, label in enumerate(picture.labels):
            for column, axes in enumerate(grid[row]):
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if column == 0:
                    axes.imshow(picture.photograph)
                    axes.set_ylabel(label, fontsize=9)
                    continue
                layer = layers[column - 1]
                values = picture.similarity[layer][:, row].reshape(picture.grid)
                drawn = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)
                if row == 0:
                    axes.set_title(f"layer {layer}", fontsize=9)
        bar = figure.colorbar(drawn, ax=grid[:, -1], shrink=0.8)
        bar.set_label("centred cosine", fontsize=8)
    return figure


def sentences(run: AlignmentResults) -> list[str]:
    """What the numbers say, in words."""
    found = []
    tower, after = (_row(run.curve("von_neumann_entropy"), layer) for layer in (TOWER, "0"))
    if tower is not None and after is not None:
        how = "lower" if after["ci_high"] < tower["ci_low"] else "higher" if after["ci_low"] > tower["ci_high"] else ""
        change = f"{how} behind the projector" if how else "much the same behind the projector (intervals overlap)"
        found.append(
            f"The von Neumann entropy of an image's tokens is {change}: {after['value']:.2f} nats, "
            f"{tower['value']:.2f} before it."
        )
    own, chance = (_row(run.curve("word_retrieval", control, "centred"), "0") for control in ("no", "permuted"))
    if own is not None and chance is not None:
        above = own["ci_low"] > chance["ci_high"]
        found.append(
            f"Behind the projector the nearest of the labels' words is the right one for {100 * own['value']:.1f} % of "
            f"the labelled patches, with labels permuted for {100 * chance['value']:.1f} %: "
            + ("patches say the words for what they show." if above else "no more than chance.")
        )
        curve = run.curve("word_retrieval", "no", "centred")
        best = curve.loc[curve["value"].idxmax()]
        if best["layer"] != "0":
            found.append(f"The share is largest at layer {best['layer']}: {100 * best['value']:.1f} %.")
    return found


def _row(curve: pd.DataFrame, layer: str) -> pd.Series | None:
    chosen = curve[curve["layer"] == layer]
    return chosen.iloc[0] if len(chosen) else None
