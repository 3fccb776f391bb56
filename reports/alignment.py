"""The chapter on patches and words: compression by the projector, and alignment of patches with words."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file

from probing.runs.directory import runs_in
from probing.utils.errors import UserError
from probing.utils.files import reading
from reports.charts import chart_group
from reports.curves import stack, with_positions
from reports.figures import png_data_uri
from reports.results import Results, read_run, run_name, sort_teachers, teacher_title, unique_labels
from reports.theme import CHECKPOINT, style

TOWER = "tower"
"""Value of the column `layer` for the tokens before the projector, and of `teacher` for similarity to them."""
SIMILARITIES = ("mutual_knn", "cka")
LABELS = {"permuted": "permuted labels", "random": "random projector"}
VECTORS = {"random": "random vectors"}
IMAGES = {"permuted": "permuted images"}
UNIFORM = {"uniform": "uniform attention"}
"""Controls in `results.csv` → their names in charts."""
SECTIONS: list[tuple[str, str, Mapping[str, str], list[tuple[str, str, str]]]] = [
    ("Patches and their words", "Cosines with the means subtracted. Dotted: permuted labels.", LABELS,
     [("word_cosine", "centred", "cosine with the label's word"),
      ("word_retrieval", "centred", "nearest word is the label's"),
      ("word_miou", "centred", "mIoU of the nearest words")]),
    ("Compression: how many directions the tokens of an image use",
     "From the vision tower through the projector to every layer of the LLM. Lower means more compressed.", {},
     [("von_neumann_entropy", "uncentred", "von Neumann entropy (nats)"),
      ("effective_rank", "centred", "effective rank, centred"),
      ("anisotropy", "", "anisotropy (mean cosine of two tokens)")]),
    ("Logit lens",
     "The next word that the LLM would predict from a patch's state, after the final norm. Dotted: permuted labels.",
     LABELS,
     [("lens_retrieval", "final norm", "label of the largest logit is correct"),
      ("lens_miou", "final norm", "mIoU of largest logits"),
      ("lens_entropy", "final norm", "entropy of next word (nats)")]),
    ("A patch as a sum of words", "Share of a patch's squared norm that words explain, and random vectors.", VECTORS,
     [("explained_energy_4", "orthogonal", "explained by 4 words"),
      ("explained_energy_8", "orthogonal", "explained by 8 words")]),
    ("Attention to the image", "Dotted: uniform attention.", UNIFORM,
     [("image_attention", "last token", "attention to image, last token"),
      ("image_attention", "tokens after the image", "attention to image, tokens after the image")]),
    ("Similarity to the tower and the teachers",
     "Are the same images close to each other in a layer and in the tower or a teacher? Dotted: permuted images.",
     IMAGES,
     [("mutual_knn", "", "shared nearest images"), ("cka", "", "CKA")]),
]  # fmt: skip
"""Title, text, controls and charts of the sections; a chart is a metric, its variant if it has several, and a label.

`results.csv` has more: cosines without the means subtracted, lenses without norm, other definitions of entropy and
rank, and other pursuits.
"""


def load_alignments(paths: Sequence[Path]) -> list[Results]:
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
        loaded.append(read_run(path))
    labels = unique_labels([run_name(path, entry[2]) for path, entry in zip(paths, loaded, strict=True)], paths)
    return [Results(label, *entry) for label, entry in zip(labels, loaded, strict=True)]


def section_frames(runs: Sequence[Results]) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yields title, text and rows of every section that has results; column `name` is that of the chart's file."""
    for title, text, controls, panels in SECTIONS if runs else ():
        parts = []
        for metric, variant, label in panels:
            where = {"metric": metric} | ({"variant": variant} if variant else {})
            rows = stack(runs, {"none": CHECKPOINT, **controls}, **where)
            rows = rows[rows["value"].notna()].assign(panel=label, name=f"{metric}_{variant}".strip("_"))
            if metric not in SIMILARITIES:
                parts.append(rows)
                continue
            for teacher in sorted(sort_teachers(rows["teacher"]), key=lambda teacher: teacher != TOWER):
                with_ = "the tower" if teacher == TOWER else f"the {teacher_title(teacher).lower()} teacher"
                own = rows[rows["teacher"] == teacher]
                parts.append(own.assign(panel=f"{label} with {with_}", name=f"{metric}_{teacher}"))
        if parts and len(frame := pd.concat(parts, ignore_index=True)):
            yield title, text, with_positions(frame.drop(columns="teacher"))


def chapter(runs: Sequence[Results], names: Sequence[str]) -> dict[str, Any]:
    """Returns the variables of the templates; `names` are all checkpoints of the page."""
    sections = [
        chart_group(frame, names, "", headline=not index, title=title, text=text)
        for index, (title, text, frame) in enumerate(section_frames(runs))
    ]
    entries = [
        {"run": run, "sentences": list(sentences(run)), "pictures": list(patch_pictures(run.path))} for run in runs
    ]
    return {"alignments": entries, "alignment_sections": sections}


def patch_pictures(run: Path) -> Iterator[dict[str, Any]]:
    """Yields the images of `pictures/patches.*` for the template; nothing if none were saved.

    Each has a figure of the similarity of patches to labels, and by layer a table of the nearest word of every patch.
    """
    source = run / "pictures" / "patches.json"
    if not source.exists():
        return
    with reading(source, "remove it and measure again"):
        content = json.loads(source.read_text(encoding="utf-8"))
        tensors = load_file(source.with_suffix(".safetensors"))
    rows, columns = content["grid"]
    for index, entry in enumerate(content["images"]):
        similarity = {
            layer: tensors[f"similarity.{index}.{layer}"].reshape(rows, columns, -1) for layer in content["layers"]
        }
        tables = []
        for layer, words in entry["words"].items():
            sums = [" + ".join(f"{weight:.2g} {word}" for word, weight in terms) for terms in entry["sums"][layer]]
            cells = [
                {"text": near[0], "title": f"nearest: {', '.join(near)}; as a sum of words: {total or 'none'}"}
                for near, total in zip(words, sums, strict=True)
            ]
            tables.append({"layer": layer, "rows": [cells[row * columns : (row + 1) * columns] for row in range(rows)]})
        yield {
            "name": entry["image"],
            "src": png_data_uri(similarity_figure(tensors[f"photograph.{index}"], entry["labels"], similarity)),
            "alt": f"{entry['image']}: similarity of each patch to the words of {', '.join(entry['labels'])}, by layer",
            "tables": tables,
        }


def similarity_figure(
    photograph: NDArray[np.uint8], labels: Sequence[str], similarity: Mapping[str, NDArray[Any]]
) -> Figure:
    """Draws the photograph, and for every label and layer the similarity of each patch to the label's word.

    Args:
        photograph: (S, S, 3).
        labels: the classes that cover most of the image.
        similarity: by layer the centred cosines, (rows, columns, labels).
    """
    limit = max(float(np.abs(values).max()) for values in similarity.values()) or 1.0
    with mpl.rc_context(style()):
        figure = Figure(figsize=(1.5 * (len(similarity) + 1), 1.55 * len(labels) + 0.5), layout="constrained")
        grid = figure.subplots(len(labels), len(similarity) + 1, squeeze=False)
        for row, label in enumerate(labels):
            grid[row, 0].imshow(photograph)
            grid[row, 0].set_ylabel(label)
            for axes, (layer, values) in zip(grid[row, 1:], similarity.items(), strict=True):
                image = axes.imshow(values[..., row], cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.set_title("" if row else f"layer {layer}")
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[], frame_on=False)
        figure.colorbar(image, ax=grid[:, -1], shrink=0.8, label="centred cosine")
    return figure


FACTS = (
    ("mutual_knn", {"teacher": TOWER}, "permuted images", "0",
     "{} of an image's nearest images before the projector remain its nearest after it"),
    ("word_retrieval", {"variant": "centred"}, "permuted labels", "0",
     "After the projector the nearest label word is correct for {} of the labelled patches"),
    ("lens_retrieval", {"variant": "final norm"}, "permuted labels", "",
     "With the logit lens the correct label is the most likely for {} of the labelled patches at the best layer, {}"),
    ("explained_energy_8", {"variant": "orthogonal"}, "random vectors", "0",
     "Eight words explain {} of a patch after the projector"),
)  # fmt: skip
"""Metric, its columns, its control, layer (empty: the best) and sentence."""


def sentences(run: Results) -> Iterator[str]:
    """Summarises the results in sentences, each with the interval of its control."""
    entropy = run.layers(metric="von_neumann_entropy").set_index("layer")
    if {TOWER, "0"} <= {*entropy.index}:
        before, after = entropy.loc[TOWER], entropy.loc["0"]
        yield (
            f"The von Neumann entropy of an image's tokens is {after['value']:.2f} nats after the projector, "
            f"{before['value']:.2f} before it: {_compared(after, before, 'lower', 'higher')}."
        )
    for metric, where, name, layer, text in FACTS:
        own, chance = (run.layers(metric=metric, control=control, **where) for control in ("none", name.split()[0]))
        own = own[own["layer"] == layer] if layer else own.nlargest(1, "value")
        chance = chance[chance["layer"].isin(own["layer"])]
        if len(own) and len(chance):
            row, floor = own.iloc[0], chance.iloc[0]
            verdict = _compared(row, floor, "less than chance", "more than chance")
            yield f"{text.format(_percent(row['value']), row['layer'])}; {name}: {_interval(floor)}: {verdict}."


def _compared(row: pd.Series, other: pd.Series, lower: str, higher: str) -> str:
    if row["ci_low"] > other["ci_high"]:
        return f"clearly {higher}"
    return f"clearly {lower}" if row["ci_high"] < other["ci_low"] else "no clear difference (intervals overlap)"


def _interval(row: pd.Series) -> str:
    return f"{_percent(row['value'])} [{_percent(row['ci_low'])}, {_percent(row['ci_high'])}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
