"""The chapter on patches and words: compression by the projector, and alignment of patches with words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from reports.charts import legend, line_chart
from reports.curves import LAYER, with_positions
from reports.figures import Style, line_plot, png_data_uri, save_figure
from reports.results import (
    AVERAGE,
    CURVE,
    Results,
    interval_text,
    layer_rank,
    read_results,
    run_name,
    sort_teachers,
    teacher_title,
    unique_labels,
)
from reports.theme import CHECKPOINT, palette, style

ATOMS = (1, 2, 4, 8)
"""Numbers of words in the sparse decomposition of a patch."""
TOWER = "tower"
"""Value of the column `layer` for the tokens before the projector."""
COLUMNS = [*CURVE, "checkpoint", "control"]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        name: name of the figure's file.
        metric: metric in `results.csv`.
        label: title of the chart.
        variant: variant of the metric, if it has several.
        teacher: the reference of similarity metrics: the tower or a teacher.
        control: control in `results.csv` that shows chance.
        chance: name of that control in the legend.
        folded: whether the page shows it on request only.
    """

    name: str
    metric: str
    label: str
    variant: str = ""
    teacher: str = ""
    control: str = ""
    chance: str = ""
    folded: bool = False
    xlabel: ClassVar[str] = LAYER

    def frame(self, runs: Sequence["AlignmentResults"]) -> pd.DataFrame:
        """Returns the rows of the chart, see `reports.curves`."""
        controls = {"none": CHECKPOINT} | ({self.control: self.chance} if self.control else {})
        if self.control == "permuted":
            controls["random"] = "random projector"
        parts = [
            run.curve(self.metric, control, self.variant, self.teacher).assign(checkpoint=run.label, control=name)
            for control, name in controls.items()
            for run in runs
        ]
        return with_positions(pd.concat(parts)[COLUMNS])


@dataclass(frozen=True)
class Pursuit(Panel):
    """The share of a patch that N words explain at the first layer, and N random vectors."""

    xlabel: ClassVar[str] = "words"

    def frame(self, runs: Sequence["AlignmentResults"]) -> pd.DataFrame:
        """Returns the rows of the chart; N is in the place of the layer."""
        parts = []
        for control, name in {"none": CHECKPOINT, "random": "random vectors"}.items():
            for run in runs:
                for count in ATOMS:
                    rows = run.curve(f"explained_energy_{count}", control, self.variant).iloc[:1]
                    parts.append(rows.assign(layer=str(count), checkpoint=run.label, control=name))
        return with_positions(pd.concat(parts)[COLUMNS])


PERMUTED = {"control": "permuted", "chance": "permuted labels"}
LABELS = {
    "word_cosine": "cosine with the label's word", "word_retrieval": "nearest word is the label's",
    "word_miou": "mIoU of the nearest words", "lens_retrieval": "label of the largest logit is correct",
    "lens_miou": "mIoU of largest logits", "lens_entropy": "entropy of next word (nats)",
    "von_neumann_entropy": "von Neumann entropy (nats)", "effective_rank": "effective rank, centred",
    "anisotropy": "anisotropy (mean cosine of two tokens)", "matrix_entropy": "matrix entropy, order 2 (nats)",
    "effective_rank_singular": "effective rank of singular values",
}  # fmt: skip
FOLDED = ("matrix_entropy", "effective_rank_singular")


def _panels(start: str, variants: dict[str, str]) -> list[Panel]:
    """Returns a chart per variant and metric that starts so; those of variants with a note are folded."""
    return [
        Panel(
            f"{metric}_{variant.replace(' ', '_')}", metric, label + note, variant, folded=bool(note),
            **({} if metric == "lens_entropy" else PERMUTED),
        )
        for variant, note in variants.items() for metric, label in LABELS.items() if metric.startswith(start)
    ]  # fmt: skip


SECTIONS: list[tuple[str, str, list[Panel]]] = [
    ("Compression: how many directions the tokens of an image use",
     "From the vision tower through the projector to every layer of the LLM. Lower means more compressed.",
     [Panel(f"compression_{metric}", metric, LABELS[metric], folded=metric in FOLDED) for metric in [*LABELS][6:]]),
    ("Patches and their words", "Cosines with the means subtracted. Dotted: permuted labels.",
     _panels("word", {"centred": "", "raw": ", not centred"})),
    ("Logit lens", "The next word that the LLM would predict from a patch's state. Dotted: permuted labels.",
     _panels("lens", {"final norm": "", "no norm": ", no norm"})),
    ("A patch as a sum of words",
     "Share of a patch's squared norm that words explain, compared with random vectors; N words at the first layer.",
     [Panel("explained_by_layer", "explained_energy_4", "explained by 4 words, orthogonal pursuit", "orthogonal",
            control="random", chance="random vectors")]
     + [Pursuit(f"explained_{name.replace(' ', '_')}", "", f"explained by N words, {name.split()[0]} pursuit", name,
                folded=name != "orthogonal") for name in ("orthogonal", "matching pursuit", "non-negative")]),
    ("Attention to the image", "Dotted: uniform attention.",
     [Panel(f"attention_{query.replace(' ', '_')}", "image_attention", f"attention to image, {query}", query,
            control="uniform", chance="uniform attention") for query in ("last token", "tokens after the image")]),
]  # fmt: skip
"""Title, text and charts of the sections, before the similarities, which depend on the teachers."""
SIMILARITY = ("Similarity to the tower and the teachers",
              "Whether the same images are close to each other in a layer and in the tower or a teacher.")  # fmt: skip


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
        loaded.append((first, results, manifest | ({"runs": len(runs)} if runs else {}), path))
    labels = unique_labels([run_name(path, entry[2]) for path, entry in zip(paths, loaded, strict=True)], paths)
    return [AlignmentResults(label, *entry) for label, entry in zip(labels, loaded, strict=True)]


def similarity_panels(runs: Sequence[AlignmentResults]) -> list[Panel]:
    """Returns a chart for every reference of the similarity metrics."""
    panels = []
    labels = {"mutual_knn": "shared nearest images", "cka": "CKA", "cka_places": "CKA of patch positions"}
    for metric, label in labels.items():
        available = {teacher for run in runs for teacher in run.curve(metric)["teacher"]}
        for reference in [*(available & {TOWER}), *sort_teachers(available - {TOWER})]:
            control = {} if metric == "cka_places" else {"control": "permuted", "chance": "permuted images"}
            title = "the tower" if reference == TOWER else f"the {teacher_title(reference).lower()} teacher"
            name, axis, folded = f"{metric}_{reference}", f"{label} with {title}", metric != "mutual_knn"
            panels.append(Panel(name, metric, axis, teacher=reference, folded=folded, **control))
    return panels


def panel_frames(runs: Sequence[AlignmentResults]) -> list[tuple[str, str, list[tuple[Panel, pd.DataFrame]]]]:
    """Returns title, text and charts of every section that has results."""
    found = []
    for title, text, panels in [*SECTIONS, (*SIMILARITY, similarity_panels(runs))] if runs else []:
        pairs = [(panel, panel.frame(runs)) for panel in panels]
        pairs = [(panel, frame) for panel, frame in pairs if (frame["control"] == CHECKPOINT).any()]
        found += [(title, text, pairs)] if pairs else []
    return found


def _static(pairs: Sequence[tuple[Panel, pd.DataFrame]], names: Sequence[str]) -> str:
    """Draws the charts over layers that are not folded, for readers without JavaScript."""
    shown = [(panel, frame) for panel, frame in pairs if not panel.folded and panel.xlabel == LAYER]
    frames = [frame.assign(panel=panel.label) for panel, frame in shown]
    return png_data_uri(line_plot(pd.concat(frames), colours=palette(names))) if frames else ""


def write_figures(runs: Sequence[AlignmentResults], out: Path, kind: Style, colours: dict[str, str]) -> None:
    """Writes every chart as files."""
    for *_, pairs in panel_frames(runs):
        for panel, frame in pairs:
            drawn = line_plot(frame.assign(panel=panel.label), "", colours, kind == "paper", panel.xlabel)
            save_figure(drawn, out, panel.name, kind)


def chapter(runs: Sequence[AlignmentResults], names: Sequence[str]) -> dict[str, Any]:
    """Returns the variables of the templates; `names` are all checkpoints of the page."""
    sections = [
        {
            "title": title,
            "text": text,
            "legend": legend(*(frame for _, frame in pairs), names=names),
            "static": _static(pairs, names),
            **{
                key: [
                    line_chart(frame, panel.label, names, xlabel=panel.xlabel)
                    for panel, frame in pairs
                    if panel.folded == folded
                ]
                for key, folded in {"charts": False, "more": True}.items()
            },
        }
        for title, text, pairs in panel_frames(runs)
    ]
    entries = [
        {
            "label": run.label,
            "manifest": run.manifest,
            "sentences": sentences(run),
            "pictures": [_patch_picture(patches) for patches in read_patch_pictures(run.path)],
        }
        for run in runs
    ]
    return {"alignments": entries, "alignment_sections": sections}


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
    with mpl.rc_context(style()):
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


def _patch_picture(patches: PatchPicture) -> dict[str, Any]:
    rows, columns = patches.grid
    tables = []
    for layer, words in patches.words.items():
        sums = [" + ".join(f"{coefficient:.2g} {word}" for word, coefficient in terms) for terms in patches.sums[layer]]
        cells = [
            {"text": near[0], "title": f"nearest: {', '.join(near)}; as a sum of words: {total or 'none'}"}
            for near, total in zip(words, sums, strict=True)
        ]
        tables.append({"layer": layer, "rows": [cells[row * columns : (row + 1) * columns] for row in range(rows)]})
    return {
        "name": patches.name,
        "src": png_data_uri(similarity_figure(patches)),
        "alt": f"{patches.name}: similarity of each patch to the words of {', '.join(patches.labels)}, by layer",
        "tables": tables,
    }


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
