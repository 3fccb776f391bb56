"""One self-contained HTML page per report, with the figures and the table as files beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from probing.run import disk_errors, is_alignment, whole_file, write_text
from reports.alignment import AlignmentResults, difference_table, load_alignments
from reports.chapter import chapter
from reports.curves import (
    MEAN_LABEL,
    OWN_LABEL,
    PROBES,
    SHOWN,
    Series,
    difference_teachers,
    learning_figure,
    levels,
    panel_title,
    series,
    shown_probes,
    teachers_of,
)
from reports.differences import against, measures_of, references
from reports.embed import picture
from reports.figures import Style, having, measures, save, slug, write_curves, write_differences
from reports.findings import METRIC, PROTOCOL, convergence, random_control, teacher_finding
from reports.grids import grid_figure, read_grids
from reports.plots import (
    Line,
    layer_plot,
    marker_definitions,
    marker_id,
    named_plot,
    svg,
    table_line,
    tones,
)
from reports.results import AVERAGE, TITLES, RunResults, layer_rank, load_runs, metric_label
from reports.strips import viewers
from reports.styles import DASHES, marker, places, tone
from reports.tables import decoded_table

COLUMNS = {
    "resampler": ("resampler", "no"),
    "resampler, shuffled pairs": ("resampler", "shuffled"),
    "resampler, random weights": ("resampler", "random"),
    **{f"resampler, {name}": ("resampler", control) for control, (name, _) in SHOWN.items()},
    "ridge": ("ridge", "no"),
    "ridge, random weights": ("ridge", "random"),
    **{f"ridge, {name}": ("ridge", control) for control, (name, _) in SHOWN.items()},
}


def write_report(
    runs: Sequence[Path],
    out: Path,
    differences: pd.DataFrame | None = None,
    statements: Sequence[str] = (),
    style: Style = "screen",
) -> Path:
    """Writes the page, `figures/` and the merged `results.csv`.

    Args:
        runs: evaluated runs; the first names the teachers, and their order gives the checkpoints their colours.
        out: folder of the report.
        differences: paired differences, from `probing compare`.
        statements: what they say, a sentence each.
        style: of the figures.

    Returns:
        Path of the page.

    Raises:
        UserError: a folder is no run, or has no results yet, or the page cannot be written.
    """
    with disk_errors(out):
        return _write_report(runs, out, differences, statements, style)


def _write_report(
    paths: Sequence[Path], out: Path, differences: pd.DataFrame | None, statements: Sequence[str], style: Style
) -> Path:
    probed, aligned = [path for path in paths if not is_alignment(path)], [path for path in paths if is_alignment(path)]
    runs, alignments = load_runs(probed), load_alignments(aligned)
    ours, theirs = places(*([one.manifest["checkpoint"]["sha256"] for one in many] for many in (runs, alignments)))
    runs = [replace(run, place=place) for run, place in zip(runs, ours, strict=True)]
    alignments = [replace(run, place=place) for run, place in zip(alignments, theirs, strict=True)]
    words = chapter(alignments, out, style) if alignments else {}
    panels = [panel for part in words.get("alignment_parts", []) for panel in part["panels"]]
    used = [(line.tone, line.marker) for panel in panels for line in panel["lines"]]
    page = out / "index.html"
    if differences is not None:
        write_text(out / "differences.csv", differences.to_csv(index=False))
    _write_merged([*runs, *alignments], out)
    common = {**words, "tones": tones()}
    if not runs:
        told = difference_table(differences) if differences is not None else None
        text = _templates().get_template("alignment_page.html")
        write_text(page, text.render(**common, markers=marker_definitions(used), told=told))
        return page
    lines = series(runs)
    used += [(line.tone, line.marker) for line in lines]
    write_curves(runs, out, style)
    table = decoded_table(runs)
    if table:
        write_text(out / "table8.csv", table.frame().to_csv(index_label="checkpoint"))
    compared: dict[str, Any] = {}
    if differences is not None:
        place = _places(runs, differences)
        write_differences(differences, place, out, style)
        compared = _compared(differences, place)
        used += [(tone(number), marker(number)) for number in place.values()]
    rendered = _templates().get_template("page.html").render(
        **common,
        markers=marker_definitions(used),
        runs=runs,
        findings=_findings(runs),
        titles=TITLES,
        random={run.label: random_control(run) for run in runs},
        convergence={run.label: convergence(run) for run in runs},
        sections=_sections(runs),
        table=table,
        viewers=_pictures(runs, out),
        tone=tone,
        compared=compared,
        statements=list(statements),
        learning=[_learning(run, len(runs) > 1, out, style) for run in runs if len(run.curves)],
    )  # fmt: skip
    write_text(page, rendered)
    return page


def _templates() -> jinja2.Environment:
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _write_merged(runs: Sequence[RunResults | AlignmentResults], out: Path) -> None:
    merged = pd.concat([run.results.assign(checkpoint=run.label) for run in runs])
    write_text(out / "results.csv", merged.to_csv(index=False))


def _places(runs: Sequence[RunResults], differences: pd.DataFrame) -> dict[str, int]:
    """The number of every checkpoint that differences name; names that no run has come after those."""
    found = {run.label: run.place for run in runs}
    for name in references(differences):
        found.setdefault(name, len(found))
    return found


def _findings(runs: Sequence[RunResults]) -> list[Any]:
    """Sentences, where the metric that they are about was evaluated in every run."""
    if len(having(runs, METRIC, PROTOCOL)) < len(runs):
        return []
    return [teacher_finding(run, teacher) for run in runs for teacher in run.teachers_of(METRIC, PROTOCOL)]


def _learning(run: RunResults, several: bool, out: Path, style: Style) -> dict[str, str]:
    figure = learning_figure(run)
    source = picture(figure, dpi=130)
    save(figure, out, f"learning_{run.label}" if several else "learning", style)
    return {"run": run.label, "src": source}


def _pictures(runs: Sequence[RunResults], out: Path) -> list[Any]:
    """Picture grids as files, and the same pictures for the page."""
    drawn = [(run, read_grids(run.path)) for run in runs]
    for run, grids in drawn:
        suffix = "" if len(runs) == 1 else f"_{slug(run.label)}"
        for grid in grids:
            folder = out / "figures"
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / f"grid_{grid.teacher}_{grid.probe}{suffix}.png") as file:
                grid_figure(grid).savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)
    return viewers(drawn)


def _title(label: str) -> str:
    """With a capital, except where the name has its own (mIoU)."""
    return label if label[1].isupper() else label[0].upper() + label[1:]


def _sections(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    sections = []
    for metric, protocol in measures(runs):
        there = having(runs, metric, protocol)
        lines, teachers = series(there), teachers_of(there, metric, protocol)
        rows = []
        for probe in shown_probes(there):
            plots = [
                svg(layer_plot(lines, teacher, probe, metric, protocol))
                for teacher in teachers
                if any(len(x.run.curve(teacher, probe, x.control, metric, protocol)) for x in lines)
            ]
            rows += [{"probe": PROBES[probe], "plots": plots}] if plots else []
        tables = [_table(run, t, metric, protocol) for run in there for t in run.teachers_of(metric, protocol)]
        own = any(levels(there, teacher, metric, protocol)[1] is not None for teacher in teachers)
        sections.append(
            {
                "title": _title(metric_label(metric, protocol)),
                "headline": (metric, protocol) == (METRIC, PROTOCOL),
                "legend": _legend(lines, own),
                "rows": rows,
                "tables": tables,
            }
        )
    return sections


def _legend(lines: Sequence[Series], own: bool) -> list[dict[str, Any]]:
    entries = [
        {"label": x.label, "tone": x.tone, "dash": DASHES[x.dash], "marker": marker_id(x.tone, x.marker),
         "thin": x.control != "no"}
        for x in lines
    ]  # fmt: skip
    entries.append({"label": MEAN_LABEL, "tone": "grey", "dash": DASHES["-."], "marker": "", "thin": True})
    ceiling = {"label": OWN_LABEL, "tone": "ink", "dash": "", "marker": "", "thin": True}
    return [*entries, ceiling] if own else entries


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


def _compared(differences: pd.DataFrame, place: Mapping[str, int]) -> dict[str, Any]:
    """Differences from every checkpoint that one may choose, as plots and as a table of means over the layers."""
    names = references(differences)
    frames = {name: against(differences, name) for name in names}
    return {
        "references": names,
        "metrics": [
            {
                "title": _title(metric_label(metric, protocol)),
                "headline": (metric, protocol) == (METRIC, PROTOCOL),
                "plots": [_difference_plots(frame, metric, protocol, place) for frame in frames.values()],
            }
            for metric, protocol in measures_of(differences, (METRIC, PROTOCOL))
        ],
        "means": [_means(frame) for frame in frames.values()],
        "entries": [
            {"label": name, "tone": tone(place[name]), "dash": "", "thin": False,
             "marker": marker_id(tone(place[name]), marker(place[name]))}
            for name in names
        ],
    }  # fmt: skip


def _difference_plots(frame: pd.DataFrame, metric: str, protocol: str, place: Mapping[str, int]) -> list[Any]:
    chosen = frame[(frame["metric"] == metric) & (frame["protocol"] == protocol) & (frame["layer"] != AVERAGE)]
    plots = []
    for probe in PROBES:
        for teacher in difference_teachers(chosen):
            rows = chosen[(chosen["teacher"] == teacher) & (chosen["probe"] == probe)]
            lines: list[tuple[Line, Sequence[str]]] = []
            for checkpoint, part in rows.groupby("checkpoint", sort=False):
                number = place[checkpoint]
                part = part.iloc[part["layer"].map(layer_rank).argsort(kind="stable")]
                line = table_line(checkpoint, tone(number), "-", marker(number), part)
                lines.append((line, list(part["layer"])))
            if lines:
                zero = [("no difference", "ink", "-", 0.0)]
                ylabel = f"difference from {rows['reference'].iloc[0]}"
                plots.append(svg(named_plot(panel_title(teacher, probe), lines, levels=zero, ylabel=ylabel)))
    return plots


def _means(frame: pd.DataFrame) -> list[list[str]]:
    """Rows of the table of mean differences."""
    return [
        [
            f"{row['checkpoint']} − {row['reference']}",
            TITLES.get(row["teacher"], row["teacher"]),
            PROBES.get(row["probe"], row["probe"]),
            metric_label(row["metric"], row["protocol"]),
            f"{row['value']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]",
            str(row["n"]),
        ]
        for _, row in frame[(frame["layer"] == AVERAGE) & (frame["probe"] != "")].iterrows()
    ]
