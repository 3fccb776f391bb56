"""One self-contained HTML page per report, with the figures and the table as files beside it."""

import base64
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from probing.run import disk_errors, is_alignment, is_benchmark, members, whole_file, write_text
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
    difference_table,
    layer_lines,
    likeness_measures,
    load_alignments,
    read_pictures,
    sentences,
    similarity_figure,
    sums_figure,
)
from reports.benchmarks import (
    BenchmarkResults,
    accuracy_table,
    load_benchmarks,
    not_alike,
    panels,
    quality_figure,
)
from reports.curves import (
    PROBES,
    SHOWN,
    difference_figure,
    layer_figure,
    learning_figure,
    legend_handles,
    panel_figure,
    series,
)
from reports.findings import METRIC, PROTOCOL, convergence, random_control, teacher_finding
from reports.grids import Grid, grid_figure, read_grids
from reports.results import TITLES, RunResults, load_runs, metric_label
from reports.tables import DecodedTable, decoded_table

logger = logging.getLogger(__name__)

COLUMNS = {
    "resampler": ("resampler", "no"),
    "resampler, shuffled pairs": ("resampler", "shuffled"),
    "resampler, random weights": ("resampler", "random"),
    **{f"resampler, {name}": ("resampler", control) for control, (name, _) in SHOWN.items()},
    "ridge": ("ridge", "no"),
    "ridge, random weights": ("ridge", "random"),
    **{f"ridge, {name}": ("ridge", control) for control, (name, _) in SHOWN.items()},
}
DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}


def write_report(
    runs: Sequence[Path], out: Path, differences: pd.DataFrame | None = None, statements: Sequence[str] = ()
) -> Path:
    """Writes the page, `figures/` (PNG, SVG, PDF) and the merged `results.csv`.

    Args:
        runs: evaluated runs; the first names the teachers.
        out: folder of the report.
        differences: paired differences from the first run, from `probing compare`.
        statements: what they say, a sentence each.

    Returns:
        Path of the page.

    Raises:
        UserError: a folder is no run, or has no results yet, or the page cannot be written.
    """
    with disk_errors(out):
        return _write_report(runs, out, differences, statements)


def _write_report(runs: Sequence[Path], out: Path, differences: pd.DataFrame | None, statements: Sequence[str]) -> Path:
    aligned, asked = [run for run in runs if is_alignment(run)], [run for run in runs if is_benchmark(run)]
    probed = [run for run in runs if run not in aligned and run not in asked]
    alignments, benchmarks = load_alignments(aligned), load_benchmarks(asked)
    chapter = _chapter(alignments, out) if alignments else {}
    chapter |= _benchmarks(probed, benchmarks, out) if benchmarks else {}
    page = out / "index.html"
    if differences is not None:
        write_text(out / "differences.csv", differences.to_csv(index=False))
    if not probed:
        _write_merged([*alignments, *benchmarks], out)
        template = _templates().get_template("alignment_page.html" if alignments else "benchmark_page.html")
        told = difference_table(differences) if differences is not None else None
        write_text(page, template.render(**chapter, told=told))
        return page
    loaded = load_runs(probed)
    for metric, protocol in _measures(loaded):
        _save(layer_figure(loaded, metric, protocol), out, f"layers_{metric}_{protocol}")
    grids = {}
    for run in loaded:
        suffix = "" if len(loaded) == 1 else f"_{_slug(run.label)}"
        if len(run.curves):
            _save(learning_figure(run), out, f"learning{suffix}")
        grids[run.label] = [_grid(grid, out / "figures", suffix) for grid in read_grids(run.path)]
    table = decoded_table(loaded)
    if table:
        write_text(out / "table8.csv", table.frame().to_csv(index_label="checkpoint"))
    _write_merged([*loaded, *alignments, *benchmarks], out)
    compared = []
    if differences is not None:
        compared = [_difference(differences, *key, out) for key in _difference_keys(differences)]
    write_text(page, _render(loaded, grids, table, compared, list(statements), chapter))
    return page


def _write_merged(runs: Sequence[RunResults | AlignmentResults | BenchmarkResults], out: Path) -> None:
    merged = pd.concat([run.results.assign(checkpoint=run.label) for run in runs])
    write_text(out / "results.csv", merged.to_csv(index=False))


def _difference_keys(differences: pd.DataFrame) -> list[tuple[str, str]]:
    """Metric and protocol of every figure of differences; the centred cosine first."""
    keys = set(zip(differences["metric"], differences["protocol"], strict=True))
    return sorted(keys, key=lambda key: (key != (METRIC, PROTOCOL), key))


def _difference(differences: pd.DataFrame, metric: str, protocol: str, out: Path) -> dict[str, Any]:
    """One figure of differences, written and given to the page."""
    figure = difference_figure(differences, metric, protocol)
    source = _image(figure)
    _save(figure, out, f"differences_{metric}_{protocol}")
    title = _title(metric_label(metric, protocol))
    return {"title": title, "src": source, "headline": (metric, protocol) == (METRIC, PROTOCOL)}


def _measures(runs: Sequence[RunResults]) -> list[tuple[str, str]]:
    """Metric and protocol of all that any of the runs was evaluated for."""
    return list(dict.fromkeys(measure for run in runs for measure in run.measures))


def _grid(grid: Grid, folder: Path, suffix: str) -> dict[str, str]:
    """Writes a picture grid as PNG, and gives it to the page."""
    name = f"{TITLES.get(grid.teacher, grid.teacher)}, {PROBES[grid.probe]}"
    buffer, small = io.BytesIO(), io.BytesIO()
    grid_figure(grid).savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)
    file = folder / f"grid_{grid.teacher}_{grid.probe}{suffix}.png"
    with whole_file(file) as temporary:
        temporary.write_bytes(buffer.getvalue())
    with Image.open(buffer) as picture:  # 256 colours of its own: a third of the size, and hardly to be seen
        picture.convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return {
        "title": name,
        "probe": grid.probe,
        "alt": f"{name}: what the decoder makes of each layer, below photograph and teacher",
        "src": "data:image/png;base64," + base64.b64encode(small.getvalue()).decode(),
    }


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def _save(figure: Figure, folder: Path, name: str) -> None:
    """Writes a figure; what a table says in its name can be no path."""
    place = folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for every format again
    figure.savefig(place / f"{_slug(name)}.png", dpi=160)
    figure.savefig(place / f"{_slug(name)}.svg", metadata={"Date": None})
    figure.savefig(place / f"{_slug(name)}.pdf", metadata={"CreationDate": None})


def _image(figure: Figure) -> str:
    """A figure as a data URI: SVG sharp at every width, and no identifiers that could clash within the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cell(row: pd.Series) -> str:
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def _table(run: RunResults, teacher: str, metric: str, protocol: str) -> dict[str, Any]:
    """Layer by layer, every probe and control that was run."""
    columns: dict[str, dict[str, str]] = {}
    layers: list[str] = []
    for title, (probe, control) in COLUMNS.items():
        curve = run.curve(teacher, probe, control, metric, protocol)
        if len(curve):
            columns[title] = {row["layer"]: _cell(row) for _, row in curve.iterrows()}
            layers = layers or list(curve["layer"])
    rows = [[layer, *(cells.get(layer, "") for cells in columns.values())] for layer in layers]
    return {
        "title": f"{TITLES.get(teacher, teacher)}, {metric_label(metric, protocol)}",
        "run": run.label,
        "head": ["layer", *columns],
        "rows": rows,
        "mean": run.mean_target(teacher, metric, protocol),
        "own": run.own_feature(teacher, metric, protocol),
    }


def _title(label: str) -> str:
    """With a capital, except where the name has its own (mIoU)."""
    return label if label[1].isupper() else label[0].upper() + label[1:]


def _sections(runs: list[RunResults]) -> list[dict[str, Any]]:
    sections = []
    for metric, protocol in _measures(runs):
        there = [r for r in runs if ((r.results["metric"] == metric) & (r.results["protocol"] == protocol)).any()]
        rows = [
            {
                "probe": name,
                "panels": [
                    {
                        "alt": f"{name}, {TITLES.get(teacher, teacher)}: {metric_label(metric, protocol)} by layer",
                        "src": _image(panel_figure(there, teacher, probe, metric, protocol)),
                    }
                    for teacher in there[0].teachers_of(metric, protocol)
                ],
            }
            for probe, name in PROBES.items()
            if any((run.results["probe"] == probe).any() for run in there)
        ]
        tables = [_table(run, t, metric, protocol) for run in there for t in run.teachers_of(metric, protocol)]
        sections.append(
            {
                "title": _title(metric_label(metric, protocol)),
                "headline": (metric, protocol) == (METRIC, PROTOCOL),
                "own": any(table["own"] is not None for table in tables),
                "key": f"{metric}_{protocol}",
                "rows": rows,
                "tables": tables,
            }
        )
    return sections


def _render(
    runs: list[RunResults],
    grids: dict[str, list[dict[str, str]]],
    table: DecodedTable | None,
    compared: list[dict[str, Any]],
    statements: list[str],
    chapter: dict[str, Any],
) -> str:
    handles = legend_handles(series(runs), own=True)
    legend = [
        {"label": h.get_label(), "colour": str(h.get_color()), "dash": DASHES.get(str(h.get_linestyle()), "dashed")}
        for h in handles
    ]
    return (
        _templates()
        .get_template("page.html")
        .render(
            **chapter,
            runs=runs,
            legend=legend,
            findings=[teacher_finding(run, teacher) for run in runs for teacher in run.teachers]
            if _headline(runs)
            else [],
            titles=TITLES,
            random={run.label: random_control(run) for run in runs},
            convergence={run.label: convergence(run) for run in runs},
            sections=_sections(runs),
            table=table,
            grids=grids,
            compared=compared,
            statements=statements,
            learning=[{"run": run.label, "src": _image(learning_figure(run))} for run in runs if len(run.curves)],
        )
    )


def _templates() -> jinja2.Environment:
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _chapter(runs: list[AlignmentResults], out: Path) -> dict[str, Any]:
    """The chapter on patches and words: figures written, and given to the page."""

    def panel(figure: Figure, name: str, alt: str) -> dict[str, str]:
        source = _image(figure)
        _save(figure, out, name)
        return {"src": source, "alt": alt}

    def part(title: str, text: str, measures: Sequence[Measure]) -> dict[str, Any]:
        there = [m for m in measures if any(len(run.curve(m.metric, "no", m.protocol, m.teacher)) for run in runs)]
        panels = [panel(layer_lines(runs, m), m.name, f"{m.label} by layer") for m in there]
        return {"title": title, "text": text, "panels": panels}

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
    sums["panels"] += [
        panel(sums_figure(runs, name, first), f"explained_{name.replace(' ', '_')}", f"{label}, by number of words")
        for name, label in SUMS.items()
        if sums["panels"]
    ]
    parts.append(sums)
    parts.append(
        part(
            "Likeness to the tower and the teachers",
            "Whether the same images are near each other: in a layer, and in what stands beside it.",
            likeness_measures(runs),
        )
    )
    parts.append(part("Attention to the image", "Dotted: if attention were uniform.", ATTENTION))
    entries = [
        {
            "label": run.label,
            "manifest": run.manifest,
            "sentences": sentences(run),
            "pictures": [_patch_picture(picture) for picture in read_pictures(run.path)],
        }
        for run in runs
    ]
    return {"alignments": entries, "alignment_parts": [one for one in parts if one["panels"]]}


def _benchmarks(probed: Sequence[Path], asked: Sequence[BenchmarkResults], out: Path) -> dict[str, Any]:
    """The chapter on benchmarks; runs with probes are joined with them checkpoint by checkpoint."""
    single = [run for path in probed for run in members(path) or [path] if (run / "results.csv").exists()]
    runs = load_runs(single)
    joined = panels(runs, asked)
    if joined:
        whole = pd.concat([p.points.assign(benchmark=p.benchmark, teacher=p.teacher, probe=p.probe) for p in joined])
        write_text(out / "quality_accuracy.csv", whole.to_csv(index=False))
    names, figures = list(dict.fromkeys(run.benchmark for run in asked)), []
    for name in names:
        drawn = [panel for panel in joined if panel.benchmark == name and panel.correlation is not None]
        if drawn:
            figure = quality_figure(drawn)
            figures.append({"src": _image(figure), "alt": f"Quality of the representations against accuracy, {name}"})
            _save(figure, out, f"quality_{name}")
    said = list(dict.fromkeys(panel.sentence for panel in joined)) + (not_alike(runs) if joined else [])
    if runs and not joined:
        said = ["No checkpoint has both probes and answers: none of the runs are of the same weights."]
    return {
        "benchmark_runs": asked,
        "benchmark_tables": [accuracy_table(asked, name) for name in names],
        "benchmark_figures": figures,
        "benchmark_sentences": said,
    }


def _patch_picture(picture: PatchPicture) -> dict[str, Any]:
    rows, columns = picture.grid
    tables = []
    for layer, words in picture.words.items():
        sums = [" + ".join(f"{part:.2g} {word}" for word, part in found) for found in picture.sums[layer]]
        cells = [
            {"text": near[0], "title": f"nearest: {', '.join(near)}; as a sum: {found or 'of no words'}"}
            for near, found in zip(words, sums, strict=True)
        ]
        tables.append({"layer": layer, "rows": [cells[row * columns : (row + 1) * columns] for row in range(rows)]})
    return {
        "name": picture.name,
        "src": _image(similarity_figure(picture)),
        "alt": f"{picture.name}: similarity of each patch to the words of {', '.join(picture.labels)}, by layer",
        "tables": tables,
    }


def _headline(runs: list[RunResults]) -> bool:
    """Whether the metric that the sentences are about was evaluated in every run."""
    return all(((r.results["metric"] == METRIC) & (r.results["protocol"] == PROTOCOL)).any() for r in runs)
