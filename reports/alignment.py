"""Patches and words: compression by the projector, and alignment of patches with words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from reports.plots import Line, Plot, named_plot, table_line
from reports.results import (
    AVERAGE,
    Results,
    interval_text,
    layer_rank,
    read_results,
    run_name,
    sort_teachers,
    teacher_title,
    unique_labels,
)
from reports.styles import SCREEN, marker, tone

ATOMS = (1, 2, 4, 8)
"""Numbers of words in the sparse decomposition of a patch."""
TOWER = "tower"
"""Value of the column `layer` for the tokens before the projector."""


@dataclass(frozen=True)
class AlignmentPanel:
    """One panel.

    Attributes:
        name: name of the figure's file.
        metric: metric in `results.csv`.
        label: label of the vertical axis.
        variant: variant of the metric, if it has several.
        teacher: the reference of similarity metrics: the tower or a teacher.
        control: the control, drawn dotted.
        chance: name of the control in the legend.
    """

    name: str
    metric: str
    label: str
    variant: str = ""
    teacher: str = ""
    control: str = ""
    chance: str = ""


COMPRESSION = [
    AlignmentPanel(f"compression_{metric}", metric, label)
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
VARIANTS = {"centred": "means subtracted", "raw": "not centred"}
LENS = [
    *(
        AlignmentPanel(
            f"lens_{metric}_{lens.replace(' ', '_')}", f"lens_{metric}", f"{label}, {lens}", lens, **PERMUTED
        )
        for metric, label in {
            "retrieval": "label of the largest logit is correct",
            "miou": "mIoU of largest logits",
        }.items()
        for lens in ("final norm", "no norm")
    ),
    *(
        AlignmentPanel(
            f"lens_entropy_{lens.replace(' ', '_')}", "lens_entropy", f"entropy of next word (nats), {lens}", lens
        )
        for lens in ("final norm", "no norm")
    ),
]
PURSUITS = {
    "matching pursuit": "matching pursuit",
    "orthogonal": "orthogonal pursuit",
    "non-negative": "non-negative pursuit",
}
ATTENTION = [
    AlignmentPanel(f"attention_{query.replace(' ', '_')}", "image_attention", f"attention to image, {query}", query,
            control="uniform", chance="uniform attention")
    for query in ("last token", "tokens after the image")
]  # fmt: skip


@dataclass(frozen=True)
class AlignmentResults(Results):
    """One run of `probing align`."""

    def curve(self, metric: str, control: str = "none", variant: str = "", teacher: str = "") -> pd.DataFrame:
        """Returns one curve in the order of the layers, the tower first, without layers that have no finite score.

        Args:
            metric: metric in `results.csv`.
            control: control in `results.csv`.
            variant: any, if empty.
            teacher: the reference of similarity metrics; any, if empty.
        """
        r = self.results
        chosen = r[(r["metric"] == metric) & (r["control"] == control) & (r["layer"] != AVERAGE) & r["value"].notna()]
        if variant:
            chosen = chosen[chosen["variant"] == variant]
        if teacher:
            chosen = chosen[chosen["teacher"] == teacher]
        if "all" in set(chosen["seed"]):
            chosen = chosen[chosen["seed"] == "all"]
        return chosen.iloc[chosen["layer"].map(layer_rank).argsort(kind="stable")]


def load_alignments(paths: Sequence[Path]) -> list[AlignmentResults]:
    """Reads finished runs of `probing align`, and folders of runs whose checkpoints differ only by their seed.

    Raises:
        UserError: a run has no results.
    """
    loaded = []
    for path in paths:
        runs = runs_in(path)
        if not (path / "results.csv").exists():
            fix = f"run: probing evaluate {path}" if runs else "repeat its probing align command"
            raise UserError(f"{path} has no results; {fix}")
        results = read_results(path / "results.csv")
        first = (runs or [path])[0]
        manifest = read_json(first / "manifest.json", RESTORE_ADVICE)
        loaded.append((first, results, manifest | ({"runs": len(runs)} if runs else {})))
    labels = unique_labels([run_name(path, entry[2]) for path, entry in zip(paths, loaded, strict=True)], paths)
    return [
        AlignmentResults(label, *entry, index) for index, (label, entry) in enumerate(zip(labels, loaded, strict=True))
    ]


def measure_plot(runs: Sequence[AlignmentResults], measure: AlignmentPanel) -> Plot:
    """Plots one measure by layer, a line per checkpoint, with its control and the random projector."""
    m = measure
    lines: list[tuple[Line, Sequence[str]]] = []
    for run in reversed(runs):  # the last line is drawn on top and is first in the legend
        suffix = "" if len(runs) == 1 else f", {run.label}"
        random = run.curve(m.metric, "random", m.variant, m.teacher)
        if len(random) and m.control == "permuted":
            name = f"random projector{suffix}"
            lines.append((table_line(name, ("ink", "-", "x"), random.iloc[:1], thin=True), ["0"]))
        if m.control:
            chance = run.curve(m.metric, m.control, m.variant, m.teacher)
            line = table_line(f"{m.chance}{suffix}", ("grey", ":", ""), chance, thin=True)
            lines.append((line, list(chance["layer"])))
        curve = run.curve(m.metric, "none", m.variant, m.teacher)
        line = table_line(run.label, (tone(run.style_index), "-", marker(run.style_index)), curve)
        lines.append((line, list(curve["layer"])))
    return named_plot(m.label, [line for line in lines if line[1]], zero=not m.control)


def similarity_measures(runs: Sequence[AlignmentResults]) -> list[AlignmentPanel]:
    """Returns a panel for every reference of the similarity metrics."""
    measures = []
    labels = {"cka": "CKA", "cka_places": "CKA of patch positions", "mutual_knn": "shared nearest images"}
    for metric, label in labels.items():
        available = {teacher for run in runs for teacher in run.curve(metric)["teacher"]}
        for reference in [*(available & {TOWER}), *sort_teachers(available - {TOWER})]:
            control = {} if metric == "cka_places" else {"control": "permuted", "chance": "permuted images"}
            title = "the tower" if reference == TOWER else f"the {teacher_title(reference).lower()} teacher"
            axis = f"{label} with {title}"
            measures.append(AlignmentPanel(f"{metric}_{reference}", metric, axis, teacher=reference, **control))
    return measures


def pursuit_plot(runs: Sequence[AlignmentResults], pursuit: str, layer: str) -> Plot:
    """Plots the share of a patch that N words explain at one layer, and N random vectors."""
    lines, counts = [], set()
    for run in reversed(runs):  # as in `measure_plot`
        suffix = "" if len(runs) == 1 else f", {run.label}"
        for control in ("random", "none"):
            curves = [run.curve(f"explained_energy_{count}", control, pursuit).assign(count=count) for count in ATOMS]
            rows = pd.concat(curves)
            rows = rows[rows["layer"] == layer]
            x = [float(count) for count in rows["count"]]
            if control == "none":
                lines.append(table_line(run.label, (tone(run.style_index), "-", marker(run.style_index)), rows, x))
            else:
                lines.append(table_line(f"random vectors{suffix}", ("grey", ":", ""), rows, x, thin=True))
            counts |= set(rows["count"])
    labels = {float(count): str(count) for count in sorted(counts)}
    title = f"explained at layer {layer}, {PURSUITS[pursuit]}"
    return Plot(title, lines, (list(labels), list(labels.values())), labels, xlabel="words", zero=True)


def difference_table(differences: pd.DataFrame) -> dict[str, Any]:
    """Builds the table of paired differences: a row per headline metric and layer, a column per checkpoint."""
    d = differences[differences["layer"].isin(["0", AVERAGE])]
    d = d[d["reference"] == (d["reference"].iloc[0] if len(d) else "")]
    names = list(dict.fromkeys(d["checkpoint"]))
    rows = []
    for (metric, variant), label in HEADLINE_METRICS.items():
        chosen = d[(d["metric"] == metric) & (d["variant"] == variant)]
        for layer in ("0", AVERAGE):
            part = chosen[chosen["layer"] == layer].set_index("checkpoint")
            if len(part):
                title = "mean over layers" if layer == AVERAGE else "after the projector"
                cells = [_difference(part.loc[name]) for name in names if name in part.index]
                rows.append([f"{label}; {title}", *cells])
    reference = d["reference"].iloc[0] if len(d) else ""
    return {"head": ["", *(f"{name} − {reference}" for name in names)], "rows": rows}


def _difference(row: pd.Series) -> dict[str, Any]:
    text = interval_text(row, sign="+")
    return {"text": text, "excludes_zero": bool(row["ci_low"] > 0 or row["ci_high"] < 0), "seeds": str(row["higher"])}


@dataclass(frozen=True)
class PatchPicture:
    """One image and the words of its patches.

    Attributes:
        name: file name of the image.
        photograph: (S, S, 3), uint8.
        grid: rows and columns of the patches.
        labels: the classes that cover most of the image.
        words: by layer, the nearest words of every patch.
        sums: by layer, the sparse decomposition of every patch: words with coefficients.
        similarity: by layer, the centred cosine of every patch with each label, (patches, labels).
    """

    name: str
    photograph: NDArray[np.uint8]
    grid: tuple[int, int]
    labels: list[str]
    words: dict[str, list[list[str]]]
    sums: dict[str, list[list[tuple[str, float]]]]
    similarity: dict[str, NDArray[Any]]


def read_patch_pictures(run: Path) -> list[PatchPicture]:
    """Reads `pictures/patches.*` of a run; empty if none were saved."""
    source = run / "pictures" / "patches.json"
    if not source.exists():
        return []
    with reading(source, "remove it and measure again"):
        content = json.loads(source.read_text(encoding="utf-8"))
        tensors = load_file(source.with_suffix(".safetensors"))
        rows, columns = content["grid"]
        return [
            PatchPicture(
                name=entry["image"],
                photograph=tensors[f"photograph.{index}"],
                grid=(rows, columns),
                labels=entry["labels"],
                words=entry["words"],
                sums=entry["sums"],
                similarity={layer: tensors[f"similarity.{index}.{layer}"] for layer in content["layers"]},
            )
            for index, entry in enumerate(content["images"])
        ]


def similarity_figure(picture: PatchPicture) -> Figure:
    """Draws the photograph, and for every label and layer the similarity of each patch to the label's word."""
    layers, rows = list(picture.similarity), len(picture.labels)
    limit = max(float(np.abs(values).max()) for values in picture.similarity.values()) or 1.0
    with mpl.rc_context(SCREEN):
        figure = Figure(figsize=(1.5 * (len(layers) + 1), 1.55 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, len(layers) + 1, squeeze=False)
        for row, label in enumerate(picture.labels):
            for column, axes in enumerate(grid[row]):
                axes.set(xticks=[], yticks=[], frame_on=False)
                if column == 0:
                    axes.imshow(picture.photograph)
                    axes.set_ylabel(label, fontsize=9)
                    continue
                layer = layers[column - 1]
                values = picture.similarity[layer][:, row].reshape(picture.grid)
                image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
                if row == 0:
                    axes.set_title(f"layer {layer}", fontsize=9)
        bar = figure.colorbar(image, ax=grid[:, -1], shrink=0.8)
        bar.set_label("centred cosine", fontsize=8)
    return figure


def sentences(run: AlignmentResults) -> list[str]:
    """Summarises the results in sentences."""
    result = []
    tower, after = (_row(run.curve("von_neumann_entropy"), layer) for layer in (TOWER, "0"))
    if tower is not None and after is not None:
        change = (
            "lower" if after["ci_high"] < tower["ci_low"] else "higher" if after["ci_low"] > tower["ci_high"] else ""
        )
        note = "" if change else " (intervals overlap)"
        result.append(
            f"The von Neumann entropy of an image's tokens is {change or 'similar'} after the projector{note}: "
            f"{after['value']:.2f} nats, {tower['value']:.2f} before it."
        )
    shared, chance = (_row(run.curve("mutual_knn", control, teacher=TOWER), "0") for control in ("none", "permuted"))
    if shared is not None and chance is not None:
        result.append(
            f"{_percent(shared)} of an image's nearest images before the projector remain its nearest after it; "
            f"chance: {_percent(chance)}."
        )
    retrieved, chance = (_row(run.curve("word_retrieval", control, "centred"), "0") for control in ("none", "permuted"))
    if retrieved is not None and chance is not None:
        result.append(
            f"After the projector the nearest label word is correct for {_percent(retrieved)} of the labelled patches, "
            f"with permuted labels for {_percent(chance)}: "
            + (_caveat(retrieved, chance) or "patches are close to the words for what they show")
            + "."
        )
        curve = run.curve("word_retrieval", "none", "centred")
        best = curve.loc[curve["value"].idxmax()]
        if best["layer"] != "0" and not _caveat(retrieved, chance):
            result.append(f"The share is largest at layer {best['layer']}: {_percent(best)}.")
    curve, chances = (run.curve("lens_retrieval", control, "final norm") for control in ("none", "permuted"))
    if len(curve):
        best = curve.loc[curve["value"].idxmax()]
        chance = _row(chances, best["layer"])
        assert chance is not None  # computed on the same images
        caveat = _caveat(best, chance)
        result.append(
            f"With the logit lens the correct label is the most likely for at most {_percent(best)} of the labelled "
            f"patches (layer {best['layer']}; permuted labels: {_percent(chance)}){f': {caveat}' if caveat else ''}."
        )
    explained, chance = (
        _row(run.curve("explained_energy_8", control, "orthogonal"), "0") for control in ("none", "random")
    )
    if explained is not None and chance is not None:
        more, less = explained["ci_low"] > chance["ci_high"], explained["ci_high"] < chance["ci_low"]
        verdict = "words explain more" if more else "words explain less" if less else "the intervals overlap"
        result.append(
            f"Eight words explain {_percent(explained)} of a patch after the projector, eight random vectors "
            f"{_percent(chance)}: {verdict}."
        )
    return result


def _caveat(row: pd.Series, chance: pd.Series) -> str:
    """Returns an empty string if a value is clearly above chance."""
    if row["value"] <= chance["value"]:
        return "no more than chance"
    return "" if row["ci_low"] > chance["ci_high"] else "not clearly more than chance (intervals overlap)"


def _percent(row: pd.Series) -> str:
    return f"{100 * row['value']:.1f} %"


def _row(curve: pd.DataFrame, layer: str) -> pd.Series | None:
    chosen = curve[curve["layer"] == layer]
    return chosen.iloc[0] if len(chosen) else None
