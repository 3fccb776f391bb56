"""The page's charts as Vega-Lite specifications, by Altair: one per panel, with its data as CSV."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from markupsafe import Markup

from reports.curves import DENSE, LAYER, layer_ticks
from reports.figures import line_plot, png_data_uri
from reports.results import FINAL
from reports.theme import REFERENCES, dash, palette

HEIGHT = 260
NUMBERS = ("value", "ci_low", "ci_high")


@functools.cache
def bundle() -> Markup:
    """Returns Vega, Vega-Lite and Vega-Embed as one script, which the page contains once and needs no network for."""
    version = "_".join(alt.SCHEMA_VERSION.split(".")[:2])
    return Markup(vl_convert.javascript_bundle(vl_version=version))  # type: ignore[call-arg]


def chart_group(
    frame: pd.DataFrame,
    names: Sequence[str],
    name: str,
    ylabel: str = "",
    zero: bool = False,
    headline: bool = False,
    **texts: Any,
) -> dict[str, Any]:
    """Draws a chart per panel, with one legend.

    Args:
        frame: rows of `reports.curves`; with a column `reference`, the page selects one, and figures show the first.
        names: all checkpoints of the page, in the order of their colours.
        name: name of the figure's file; a column `name` has that of every panel instead.
        ylabel: label of the vertical axes.
        zero: whether to draw a line at zero.
        headline: whether the page shows it at once, and as a picture in print and to readers without JavaScript.
        texts: further values for the template, such as `title` and `text`.

    Returns:
        For the template: `charts`, `legend`, `static` and `headline`; `figure` has the arguments of `write_group`.
    """
    panels = frame.groupby("panel", sort=False)
    first = frame[frame["reference"] == frame["reference"].iloc[0]] if "reference" in frame else frame
    return texts | {
        "charts": [line_chart(rows, str(panel), names, ylabel, zero) for panel, rows in panels],
        "legend": legend(frame, names),
        "static": png_data_uri(line_plot(first, ylabel, palette(names), zero=zero)) if headline else "",
        "headline": headline,
        "figure": {"frame": first, "name": name, "ylabel": ylabel, "zero": zero},
    }  # fmt: skip


def line_chart(
    frame: pd.DataFrame, title: str, names: Sequence[str], ylabel: str = "", zero: bool = False
) -> dict[str, Any]:
    """Draws one panel: lines with bands, values at the pointer, zoom, and names that the page's legend hides.

    With a column `reference`, the page selects one.
    """
    ticks, ends = tuple(layer_ticks(frame)), (int(frame["x"].min()), int(frame["x"].max()))
    columns = ["x", "layer", "checkpoint", "control", *NUMBERS, "n"] + ["reference"] * ("reference" in frame)
    controls = tuple(dict.fromkeys(frame["control"]))
    template = _lines(ticks, ends, controls, tuple(names), ylabel, zero, "reference" in frame)
    return template | _data(frame[columns], title)


@functools.cache
def _lines(
    ticks: tuple[tuple[int, str], ...],
    domain: tuple[int, int],
    controls: tuple[str, ...],
    names: tuple[str, ...],
    ylabel: str,
    zero: bool,
    referenced: bool,
) -> dict[str, Any]:
    """Specifies lines without data; cached, because Altair takes a tenth of a second and most panels are alike."""
    axis: dict[str, Any] = {"values": [x for x, _ in ticks], "title": LAYER, "grid": False, "format": "d"}
    if named := {str(x): layer for x, layer in ticks if layer != str(x)}:
        axis["labelExpr"] = f"({json.dumps(named)})[datum.value] || datum.label"
    shown = "indexof(hidden, datum.checkpoint) < 0 && indexof(hidden, datum.control) < 0"
    if referenced:
        shown += " && datum.reference == reference"
    dashes = alt.Scale(domain=controls, range=[list(dash(name)) or [1, 0] for name in controls])
    pointer = alt.selection_point(name="pointer", on="pointerover", nearest=True, empty=False, clear="pointerout")
    tooltip = [
        "checkpoint:N",
        "control:N",
        "layer:N",
        alt.Tooltip("value:Q", format=".4~f"),
        alt.Tooltip("ci_low:Q", title="95 % from", format=".4~f"),
        alt.Tooltip("ci_high:Q", title="95 % to", format=".4~f"),
        alt.Tooltip("n:Q", title="images"),
    ]
    base, scale = alt.Chart(), alt.Scale(domain=list(domain), nice=False, zero=False, padding=8)
    ends = {"y": alt.Y("ci_low:Q"), "y2": "ci_high:Q"}
    y = alt.Y("value:Q", title=ylabel or None, scale=alt.Scale(zero=False))
    dots = alt.when(pointer).then(alt.value(90)).when("datum.points == 1").then(alt.value(30))
    size = dots.otherwise(alt.value(14 if domain[1] <= DENSE else 5))
    layers = [
        base.transform_filter("datum.points == 1").mark_rule().encode(**ends),  # a single point has no band
        base.mark_area(opacity=0.15).encode(**ends),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=alt.StrokeDash("control:N", scale=dashes, legend=None)),
        base.mark_point(filled=True, opacity=1).encode(y=y, tooltip=tooltip, size=size).add_params(pointer, _zoom()),
        base.transform_filter(pointer).mark_rule(strokeDash=[2, 2]).encode(color=alt.value("gray")),
    ]
    if zero:
        ruler = {"x": alt.value(0), "x2": alt.value("width"), "color": alt.value("gray")}
        layers.insert(0, base.mark_rule().encode(y=alt.datum(0), **ruler))
    chart = (
        alt.layer(*layers, data=alt.NamedData("rows"))
        .encode(
            x=alt.X("x:Q", axis=alt.Axis(**axis), scale=scale), color=_colour(names), detail=["segment:N", "control:N"]
        )
        .transform_filter(shown)
        .transform_calculate(segment=f"datum.layer == '{FINAL}'")
        .transform_joinaggregate(points="count()", groupby=["segment", "checkpoint", "control"])
        .add_params(alt.param("hidden", value=[]), alt.param("reference", value=""))
    )
    return _specification(chart)


def scatter_chart(frame: pd.DataFrame, title: str, names: Sequence[str], xlabel: str, ylabel: str) -> dict[str, Any]:
    """Draws points with vertical intervals: columns checkpoint, x, value, ci_low, ci_high."""
    tooltip = ["checkpoint:N", *(alt.Tooltip(f"{name}:Q", format=".4~f") for name in ("x", *NUMBERS))]
    y = alt.Y("value:Q", title=ylabel, scale=alt.Scale(zero=False))
    chart = (
        alt.layer(
            alt.Chart().mark_rule().encode(y=alt.Y("ci_low:Q"), y2="ci_high:Q"),
            alt.Chart().mark_point(filled=True, size=60, opacity=1).encode(y=y, tooltip=tooltip).add_params(_zoom()),
            data=alt.NamedData("rows"),
        )
        .encode(x=alt.X("x:Q", title=xlabel, scale=alt.Scale(zero=False)), color=_colour(names))
        .transform_filter("indexof(hidden, datum.checkpoint) < 0")
        .add_params(alt.param("hidden", value=[]))
    )
    return _specification(chart) | _data(frame[["checkpoint", "x", *NUMBERS]], title)


def legend(frame: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the entries of a legend: name, colour index (-1 without), and dashes."""
    order, checkpoints = [*names, *REFERENCES], set(frame["checkpoint"])
    controls = dict.fromkeys(frame["control"]) if "control" in frame else ()
    entries = [{"name": name, "colour": rank, "dash": ""} for rank, name in enumerate(order) if name in checkpoints]
    dashed = [{"name": name, "colour": -1, "dash": " ".join(str(2 * x) for x in dash(name))} for name in controls]
    return entries + (dashed if len(controls) > 1 else [])


def _colour(names: Sequence[str]) -> alt.Color:
    """Returns the colours of checkpoints; the theme has their range."""
    return alt.Color("checkpoint:N", scale=alt.Scale(domain=[*names, *REFERENCES]), legend=None)


def _zoom() -> alt.Parameter:
    """Returns the zoom by dragging and by the wheel with Shift, so that the page scrolls without."""
    return alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.shiftKey]")


def _data(frame: pd.DataFrame, title: str) -> dict[str, Any]:
    """Returns rows as CSV with six significant digits, a third of the size of JSON."""
    frame = frame.assign(**{name: frame[name].map("{:.6g}".format, na_action="ignore") for name in NUMBERS})
    if "n" in frame:
        frame = frame.astype({"n": "Int64"})
    types = {name: "number" if name in (*NUMBERS, "x", "n") else "string" for name in frame}
    data = {"values": frame.to_csv(index=False), "format": {"type": "csv", "parse": types}}
    return {"data": data, "title": title, "description": f"{title}; its values are in a table below"}


def _specification(chart: alt.LayerChart) -> dict[str, Any]:
    """Returns the specification without settings, which the page has once for each theme."""
    sized = chart.properties(
        width="container", height=HEIGHT, autosize=alt.AutoSizeParams(type="fit", contains="padding")
    )
    return {key: value for key, value in sized.to_dict(validate=False).items() if key != "config"}
