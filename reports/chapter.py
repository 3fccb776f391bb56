"""Gives the chapter on patches and words to the page, and writes its figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.alignment import (
    ATTENTION,
    COMPRESSION,
    LENS,
    PERMUTED,
    SUMS,
    VARIANTS,
    WORDS,
    AlignmentResults,
    Measure,
    PatchPicture,
    likeness_measures,
    measure_plot,
    read_pictures,
    sentences,
    similarity_figure,
    sums_plot,
)
from reports.embed import picture
from reports.figures import Style, save
from reports.plots import Plot, figure, svg

LIKENESS = "Whether the same images are near each other: in a layer, and in what stands beside it."


def chapter(runs: Sequence[AlignmentResults], out: Path, style: Style) -> dict[str, Any]:
    """What the templates need of runs of `probing align`; the figures are written beside the page.

    Args:
        runs: with their places among the checkpoints of the report.
        out: folder of the report.
        style: of the figures.
    """

    def panel(plot: Plot, name: str) -> dict[str, Any]:
        save(figure(plot, style == "paper"), out, name, style)
        return {"svg": svg(plot), "lines": plot.lines}

    def part(title: str, text: str, measures: Sequence[Measure]) -> dict[str, Any]:
        there = [m for m in measures if any(len(run.curve(m.metric, "no", m.protocol, m.teacher)) for run in runs)]
        return {"title": title, "text": text, "panels": [panel(measure_plot(runs, m), m.name) for m in there]}

    parts = [
        part(
            "How few directions the tokens of an image use",
            "From the vision tower, through the projector, to every layer of the LLM. Less is more compressed.",
            COMPRESSION,
        )
    ]
    for variant, text in VARIANTS.items():
        words = [Measure(f"{metric}_{variant}", metric, label, variant, **PERMUTED) for metric, label in WORDS.items()]
        parts.append(part(f"Patches and their words, {text}", "Dotted: with labels permuted.", words))
    parts.append(
        part("Logit lens", "What the LLM would say next if a patch were its last state. Dotted: labels permuted.", LENS)
    )
    sums = part(
        "A patch as a sum of words",
        "Share of a patch's squared length that few words of the vocabulary explain, beside as many random vectors.",
        [Measure("explained_by_layer", "explained_energy", "explained by 4 words", "orthogonal, 4", control="random",
                 chance="random vectors")],
    )  # fmt: skip
    first = next((layer for run in runs for layer in run.curve("explained_energy")["layer"]), "")
    if sums["panels"]:
        sums["panels"] += [panel(sums_plot(runs, name, first), f"explained_{name.replace(' ', '_')}") for name in SUMS]
    parts.append(sums)
    parts.append(part("Likeness to the tower and the teachers", LIKENESS, likeness_measures(runs)))
    parts.append(part("Attention to the image", "Dotted: if attention were uniform.", ATTENTION))
    entries = [
        {
            "label": run.label,
            "manifest": run.manifest,
            "sentences": sentences(run),
            "pictures": [_patch_picture(found) for found in read_pictures(run.path)],
        }
        for run in runs
    ]
    return {"alignments": entries, "alignment_parts": [one for one in parts if one["panels"]]}


def _patch_picture(found: PatchPicture) -> dict[str, Any]:
    rows, columns = found.grid
    tables = []
    for layer, words in found.words.items():
        sums = [" + ".join(f"{part:.2g} {word}" for word, part in terms) for terms in found.sums[layer]]
        cells = [
            {"text": near[0], "title": f"nearest: {', '.join(near)}; as a sum: {total or 'of no words'}"}
            for near, total in zip(words, sums, strict=True)
        ]
        tables.append({"layer": layer, "rows": [cells[row * columns : (row + 1) * columns] for row in range(rows)]})
    return {
        "name": found.name,
        "src": picture(similarity_figure(found)),
        "alt": f"{found.name}: similarity of each patch to the words of {', '.join(found.labels)}, by layer",
        "tables": tables,
    }
