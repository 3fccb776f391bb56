"""The chapter on patches and words: what the projector compresses, and which words the patches are near."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file

from analysis.alignment.headlines import HEADLINE_METRICS
from probing.runs.directory import runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json, reading
from reports.charts import LAYER
from reports.plots import Line, Plot, named_plot, table_line
from reports.results import AVERAGE, FINAL, in_order, read_results, teacher_title, unique_labels
from reports.styles import SCREEN, marker, tone

ATOMS = (1, 2, 4, 8)
"""Numbers of words that a patch is composed of."""
TOWER = "tower"
"""What `results.csv` calls the tokens before the projector."""


@dataclass(frozen=True)
class Measure:
    """What one panel shows.

    Attributes:
        name: of the figure's file.
        metric: as in `results.csv`.
        label: of the vertical axis.
        variant: of the metric, where it has several.
        teacher: what layers are compared with, where that is what the metric does.
        control: the control that is drawn dotted.
        chance: its name in the legend.
    """

    name: str
    metric: str
    label: str
    variant: str = ""
    teacher: str = ""
    control: str = ""
    chance: str = ""


COMPRESSION = [
    Measure(f"compression_{metric}", metric, label)
    for metric, label in {
        "von_neumann_entropy": "von Neumann entropy (nats)",
        "matrix_entropy": "matrix entropy, order 2 (nats)",
        "effective_rank": "effective rank, centred",
        "effective_rank_singular": "effective rank of singular values",
        "anisotropy": "anisotropy (mean cosine of two tokens)",
    }.items()
]
PERMUTED = {"control": "permuted", "chance": "permuted labels"}
WORDS = {
    "word_cosine": "cosine with the label's word",
    "word_retrieval": "nearest word is the label's",
    "word_miou": "mIoU of the nearest words",
}
VARIANTS = {"centred": "means taken from patches and words", "raw": "as they are"}
LENS = [
    *(
        Measure(f"lens_{metric}_{lens.replace(' ', '_')}", f"lens_{metric}", f"{label}, {lens}", lens, **PERMUTED)
        for metric, label in {
            "retrieval": "label of the largest logit is right",
            "miou": "mIoU of largest logits",
        }.items()
        for lens in ("final norm", "no norm")
    ),
    *(
        Measure(f"lens_entropy_{lens.replace(' ', '_')}", "lens_entropy", f"entropy of next word (nats), {lens}", lens)
        for lens in ("final norm", "no norm")
    ),
]
SUMS = {
    "matching pursuit": "matching pursuit",
    "orthogonal": "orthogonal pursuit",
    "non-negative": "non-negative pursuit",
}
ATTENTION = [
    Measure(f"attention_{query.replace(' ', '_')}", "image_attention", f"attention to image, {query}", query,
            control="uniform", chance="uniform attention")
    for query in ("last token", "tokens after the image")
]  # fmt: skip


@dataclass(frozen=True)
class AlignmentResults:
    """One run of `probing align`.

    Attributes:
        label: name for legends, unique among the runs of a report.
        path: its folder.
        results: `results.csv`, with `layer` as text.
        manifest: what it was made of.
        place: its number among the checkpoints of a report, which colour and marker follow from.
    """

    label: str
    path: Path
    results: pd.DataFrame
    manifest: dict[str, Any]
    place: int = 0

    def curve(self, metric: str, control: str = "none", variant: str = "", teacher: str = "") -> pd.DataFrame:
        """One curve in the order of the layers, the tower first, without layers at which no image counts.

        Args:
            metric: as in `results.csv`.
            control: likewise.
            variant: any, if empty.
            teacher: what the layers are compared with.
        """
        r = self.results
        chosen = r[(r["metric"] == metric) & (r["control"] == control) & (r["layer"] != AVERAGE) & r["value"].notna()]
        if variant:
            chosen = chosen[chosen["variant"] == variant]
        if teacher:
            chosen = chosen[chosen["teacher"] == teacher]
        if "all" in set(chosen["seed"]):
            chosen = chosen[chosen["seed"] == "all"]
        return chosen.iloc[chosen["layer"].map(_rank).argsort(kind="stable")]


def _rank(layer: str) -> float:
    return {TOWER: -1.0, FINAL: float("inf")}.get(layer) or float(layer)


def load_alignments(paths: Sequence[Path]) -> list[AlignmentResults]:
    """Reads finished runs of `probing align`, and folders of runs whose checkpoints differ by their seed alone.

    Raises:
        UserError: one has no results.
    """
    found = []
    for path in paths:
        runs = runs_in(path)
        if not (path / "results.csv").exists():
            again = f"probing evaluate {path}" if runs else "the probing align that made it once more"
            raise UserError(f"{path} has no results; type {again}")
        results = read_results(path / "results.csv")
        first = (runs or [path])[0]
        manifest = read_json(first / "manifest.json", RESTORE_ADVICE)
        found.append((first, results, manifest | ({"runs": len(runs)} if runs else {})))
    names = [
        path.resolve().name if runs_in(path) else manifest["checkpoint"]["name"]
        for path, (_, _, manifest) in zip(paths, found, strict=True)
    ]
    return [
        AlignmentResults(label, *entry, place)
        for place, (label, entry) in enumerate(zip(unique_labels(names, paths), found, strict=True))
    ]


def measure_plot(runs: Sequence[AlignmentResults], measure: Measure) -> Plot:
    """One measure by layer, a line per checkpoint, with its control and the random projector beside it."""
    m = measure
    lines: list[tuple[Line, Sequence[str]]] = []
    for run in reversed(runs):  # what is drawn last lies on top, and stands first in the legend
        suffix = "" if len(runs) == 1 else f", {run.label}"
        fresh = run.curve(m.metric, "random", m.variant, m.teacher)
        if len(fresh) and m.control == "permuted":
            name = f"random projector{suffix}"
            lines.append((table_line(name, "ink", "-", "x", fresh.iloc[:1], thin=True), ["0"]))
        if m.control:
            chance = run.curve(m.metric, m.control, m.variant, m.teacher)
            lines.append((table_line(f"{m.chance}{suffix}", "grey", ":", "", chance, thin=True), list(chance["layer"])))
        curve = run.curve(m.metric, "none", m.variant, m.teacher)
        own = table_line(run.label, tone(run.place), "-", marker(run.place), curve)
        lines.append((own, list(curve["layer"])))
    return named_plot(m.label, [line for line in lines if line[1]], xlabel=LAYER, zero=not m.control)


def likeness_measures(runs: Sequence[AlignmentResults]) -> list[Measure]:
    """A panel for every reference that layers were compared with."""
    found = []
    kinds = {"cka": "CKA", "cka_places": "CKA of places", "mutual_knn": "nearest images shared"}
    for metric, label in kinds.items():
        there = {teacher for run in runs for teacher in run.curve(metric)["teacher"]}
        for reference in [*(there & {TOWER}), *in_order(there - {TOWER})]:
            control = {} if metric == "cka_places" else {"control": "permuted", "chance": "permuted images"}
            other = "the tower" if reference == TOWER else f"the {teacher_title(reference).lower()} teacher"
            name = f"{label} with {other}"
            found.append(Measure(f"{metric}_{reference}", metric, name, teacher=reference, **control))
    return found


def sums_plot(runs: Sequence[AlignmentResults], pursuit: str, layer: str) -> Plot:
    """Share of a patch that so many words explain, at one layer, beside so many random vectors."""
    lines, counts = [], set()
    for run in reversed(runs):  # as in `measure_plot`
        suffix = "" if len(runs) == 1 else f", {run.label}"
        for control in ("random", "none"):
            curves = [run.curve(f"explained_energy_{count}", control, pursuit).assign(count=count) for count in ATOMS]
            rows = pd.concat(curves)
            rows = rows[rows["layer"] == layer]
            if control == "none":
                line = table_line(run.label, tone(run.place), "-", marker(run.place), rows)
            else:
                line = table_line(f"random vectors{suffix}", "grey", ":", "", rows, thin=True)
            lines.append(replace(line, x=[float(k) for k in rows["count"]]))
            counts |= set(rows["count"])
    labels = {float(count): str(count) for count in sorted(counts)}
    title = f"explained at layer {layer}, {SUMS[pursuit]}"
    return Plot(title, lines, (list(labels), list(labels.values())), labels, xlabel="words", zero=True)


def difference_table(differences: pd.DataFrame) -> dict[str, Any]:
    """The paired differences that are said, a row per measure and layer, a column per checkpoint."""
    d = differences[differences["layer"].isin(["0", AVERAGE])]
    d = d[d["reference"] == (d["reference"].iloc[0] if len(d) else "")]
    names = list(dict.fromkeys(d["checkpoint"]))
    rows = []
    for (metric, variant), label in HEADLINE_METRICS.items():
        chosen = d[(d["metric"] == metric) & (d["variant"] == variant)]
        for layer in ("0", AVERAGE):
            part = chosen[chosen["layer"] == layer].set_index("checkpoint")
            if len(part):
                where = "mean over layers" if layer == AVERAGE else "behind the projector"
                cells = [_difference(part.loc[name]) for name in names if name in part.index]
                rows.append([f"{label}; {where}", *cells])
    reference = d["reference"].iloc[0] if len(d) else ""
    return {"head": ["", *(f"{name} − {reference}" for name in names)], "rows": rows}


def _difference(row: pd.Series) -> dict[str, Any]:
    text = f"{row['value']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]" if row["n"] else "no finite number"
    return {"text": text, "beyond": bool(row["ci_low"] > 0 or row["ci_high"] < 0), "seeds": str(row["higher"])}


@dataclass(frozen=True)
class PatchPicture:
    """One image, and what its patches are near.

    Attributes:
        name: of the image.
        photograph: (S, S, 3), uint8.
        grid: rows and columns of the patches.
        labels: the classes that cover most of it.
        words: by layer, the nearest words of every patch.
        sums: by layer, the words of which every patch is most nearly a sum, with their parts.
        similarity: by layer, the centred cosine of every patch with each label, (patches, labels).
    """

    name: str
    photograph: NDArray[np.uint8]
    grid: tuple[int, int]
    labels: list[str]
    words: dict[str, list[list[str]]]
    sums: dict[str, list[list[tuple[str, float]]]]
    similarity: dict[str, NDArray[Any]]


def read_pictures(run: Path) -> list[PatchPicture]:
    """Reads `pictures/patches.*` of a run; empty where none were kept."""
    source = run / "pictures" / "patches.json"
    if not source.exists():
        return []
    with reading(source, "remove it and measure again"):
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
                sums=entry["sums"],
                similarity={layer: tensors[f"similarity.{number}.{layer}"] for layer in whole["layers"]},
            )
            for number, entry in enumerate(whole["images"])
        ]


def similarity_figure(picture: PatchPicture) -> Figure:
    """Photograph, and for every label and layer how near each patch is to the label's word."""
    layers, rows = list(picture.similarity), len(picture.labels)
    most = max(float(np.abs(values).max()) for values in picture.similarity.values()) or 1.0
    with mpl.rc_context(SCREEN):
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
    kept, chance = (_row(run.curve("mutual_knn", control, teacher=TOWER), "0") for control in ("none", "permuted"))
    if kept is not None and chance is not None:
        found.append(
            f"Of an image's nearest images before the projector {_percent(kept)} are its nearest behind it too, by "
            f"chance {_percent(chance)}."
        )
    own, chance = (_row(run.curve("word_retrieval", control, "centred"), "0") for control in ("none", "permuted"))
    if own is not None and chance is not None:
        found.append(
            f"Behind the projector the nearest of the labels' words is the right one for {_percent(own)} of "
            f"the labelled patches, with labels permuted for {_percent(chance)}: "
            + (_doubt(own, chance) or "patches say the words for what they show")
            + "."
        )
        curve = run.curve("word_retrieval", "none", "centred")
        best = curve.loc[curve["value"].idxmax()]
        if best["layer"] != "0" and not _doubt(own, chance):
            found.append(f"The share is largest at layer {best['layer']}: {_percent(best)}.")
    curve, chances = (run.curve("lens_retrieval", control, "final norm") for control in ("none", "permuted"))
    if len(curve):
        best = curve.loc[curve["value"].idxmax()]
        chance = _row(chances, best["layer"])
        assert chance is not None  # the same images
        doubt = _doubt(best, chance)
        found.append(
            f"Through the logit lens the right label is likeliest for at most {_percent(best)} of the labelled patches "
            f"(layer {best['layer']}; labels permuted {_percent(chance)}){f': {doubt}' if doubt else ''}."
        )
    whole, chance = (
        _row(run.curve("explained_energy_8", control, "orthogonal"), "0") for control in ("none", "random")
    )
    if whole is not None and chance is not None:
        how = "more" if whole["ci_low"] > chance["ci_high"] else "less" if whole["ci_high"] < chance["ci_low"] else ""
        found.append(
            f"Eight words explain {_percent(whole)} of a patch behind the projector, eight random vectors "
            f"{_percent(chance)}" + (f": words explain {how}." if how else ": no clear difference (intervals overlap).")
        )
    return found


def _doubt(own: pd.Series, chance: pd.Series) -> str:
    """Why a number says nothing, or an empty string where it is clearly above its control."""
    if own["value"] <= chance["value"]:
        return "no more than chance"
    return "" if own["ci_low"] > chance["ci_high"] else "not clearly more than chance (intervals overlap)"


def _percent(row: pd.Series) -> str:
    return f"{100 * row['value']:.1f} %"


def _row(curve: pd.DataFrame, layer: str) -> pd.Series | None:
    chosen = curve[curve["layer"] == layer]
    return chosen.iloc[0] if len(chosen) else None
