"""Builds the chapter on patches and words."""

from collections.abc import Iterator, Sequence
from typing import Any

from reports.alignment import (
    ATTENTION,
    COMPRESSION,
    LENS,
    PERMUTED,
    PURSUITS,
    VARIANTS,
    WORDS,
    AlignmentPanel,
    AlignmentResults,
    PatchPicture,
    measure_plot,
    pursuit_plot,
    read_patch_pictures,
    sentences,
    similarity_figure,
    similarity_measures,
)
from reports.images import png_data_uri
from reports.plots import Plot, legend_of, svg

EXPLAINED = AlignmentPanel(
    "explained_by_layer", "explained_energy_4", "explained by 4 words", "orthogonal",
    control="random", chance="random vectors",
)  # fmt: skip


def _sections(runs: Sequence[AlignmentResults]) -> Iterator[tuple[str, str, list[tuple[Plot, str]]]]:
    """Yields title, text, and the plots with the names of their files."""

    def plots(measures: Sequence[AlignmentPanel]) -> list[tuple[Plot, str]]:
        available = [m for m in measures if any(len(run.curve(m.metric, "none", m.variant, m.teacher)) for run in runs)]
        return [(measure_plot(runs, m), m.name) for m in available]

    yield (
        "Compression: how many directions the tokens of an image use",
        "From the vision tower through the projector to every layer of the LLM. Lower means more compressed.",
        plots(COMPRESSION),
    )
    for variant, text in VARIANTS.items():
        words = [
            AlignmentPanel(f"{metric}_{variant}", metric, label, variant, **PERMUTED) for metric, label in WORDS.items()
        ]
        yield f"Patches and their words, {text}", "Dotted: permuted labels.", plots(words)
    lens = "The next word that the LLM would predict from a patch's state. Dotted: permuted labels."
    yield "Logit lens", lens, plots(LENS)
    first = next((layer for run in runs for layer in run.curve("explained_energy_4")["layer"]), "")
    by_layer = plots([EXPLAINED])
    by_count = [
        (pursuit_plot(runs, name, first), f"explained_{name.replace(' ', '_')}") for name in PURSUITS if by_layer
    ]
    yield (
        "A patch as a sum of words",
        "Share of a patch's squared norm that N words of the vocabulary explain, compared with N random vectors.",
        by_layer + by_count,
    )
    similarity = "Whether the same images are close to each other in a layer and in the tower or a teacher."
    yield "Similarity to the tower and the teachers", similarity, plots(similarity_measures(runs))
    yield "Attention to the image", "Dotted: uniform attention.", plots(ATTENTION)


def chapter_plots(runs: Sequence[AlignmentResults]) -> list[tuple[Plot, str]]:
    """Returns all plots of runs of `probing align`, with the names of their files."""
    return [plot for *_, plots in _sections(runs) for plot in plots]


def chapter(runs: Sequence[AlignmentResults]) -> dict[str, Any]:
    """Returns the variables of the templates for runs of `probing align`."""
    entries = [
        {
            "label": run.label,
            "manifest": run.manifest,
            "sentences": sentences(run),
            "pictures": [_patch_picture(patches) for patches in read_patch_pictures(run.path)],
        }
        for run in runs
    ]
    sections = [(title, text, plots) for title, text, plots in _sections(runs) if plots]
    return {
        "alignments": entries,
        "alignment_plots": [plot for *_, plots in sections for plot in plots],
        "alignment_sections": [
            {
                "title": title,
                "text": text,
                "legend": legend_of([plot for plot, _ in plots]),
                "plots": [svg(plot) for plot, _ in plots],
            }
            for title, text, plots in sections
        ],
    }


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
