"""Puts the chapter on patches and words together."""

from collections.abc import Iterator, Sequence
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
from reports.images import picture
from reports.plots import Plot, legend_of, svg

EXPLAINED = Measure("explained_by_layer", "explained_energy_4", "explained by 4 words", "orthogonal", control="random",
                    chance="random vectors")  # fmt: skip


def _parts(runs: Sequence[AlignmentResults]) -> Iterator[tuple[str, str, list[tuple[Plot, str]]]]:
    """Title, text, and the plots with the names of their files."""

    def plots(measures: Sequence[Measure]) -> list[tuple[Plot, str]]:
        there = [m for m in measures if any(len(run.curve(m.metric, "none", m.variant, m.teacher)) for run in runs)]
        return [(measure_plot(runs, m), m.name) for m in there]

    yield (
        "How few directions the tokens of an image use",
        "From the vision tower, through the projector, to every layer of the LLM. Less is more compressed.",
        plots(COMPRESSION),
    )
    for variant, text in VARIANTS.items():
        words = [Measure(f"{metric}_{variant}", metric, label, variant, **PERMUTED) for metric, label in WORDS.items()]
        yield f"Patches and their words, {text}", "Dotted: with labels permuted.", plots(words)
    lens = "What the LLM would say next if a patch were its last state. Dotted: labels permuted."
    yield "Logit lens", lens, plots(LENS)
    first = next((layer for run in runs for layer in run.curve("explained_energy_4")["layer"]), "")
    by_layer = plots([EXPLAINED])
    by_count = [(sums_plot(runs, name, first), f"explained_{name.replace(' ', '_')}") for name in SUMS if by_layer]
    yield (
        "A patch as a sum of words",
        "Share of a patch's squared length that few words of the vocabulary explain, beside as many random vectors.",
        by_layer + by_count,
    )
    likeness = "Whether the same images are near each other: in a layer, and in what stands beside it."
    yield "Likeness to the tower and the teachers", likeness, plots(likeness_measures(runs))
    yield "Attention to the image", "Dotted: if attention were uniform.", plots(ATTENTION)


def chapter_plots(runs: Sequence[AlignmentResults]) -> list[tuple[Plot, str]]:
    """All plots of runs of `probing align`, with the names of their files."""
    return [plot for *_, plots in _parts(runs) for plot in plots]


def chapter(runs: Sequence[AlignmentResults]) -> dict[str, Any]:
    """What the templates need of runs of `probing align`.

    Args:
        runs: with their places among the checkpoints of the report.
    """
    entries = [
        {
            "label": run.label,
            "manifest": run.manifest,
            "sentences": sentences(run),
            "pictures": [_patch_picture(found) for found in read_pictures(run.path)],
        }
        for run in runs
    ]
    parts = [(title, text, plots) for title, text, plots in _parts(runs) if plots]
    return {
        "alignments": entries,
        "alignment_plots": [plot for *_, plots in parts for plot in plots],
        "alignment_parts": [
            {
                "title": title,
                "text": text,
                "legend": legend_of([plot for plot, _ in plots]),
                "plots": [svg(plot) for plot, _ in plots],
            }
            for title, text, plots in parts
        ],
    }


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
