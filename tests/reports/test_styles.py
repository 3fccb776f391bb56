"""Colours that survive grey print and colour blindness, one per checkpoint; figures as publishers want them."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from matplotlib.colors import to_rgb

import reports
from probing.cli import cli
from reports.curves import difference_frame, differences_from, layer_frame
from reports.figures import layer_plot, learning_plot, line_plot
from reports.page import load, write_report
from reports.theme import DOUBLE, GROUND, REFERENCES, SINGLE, palette
from tests.helpers.charts import Parsed
from tests.helpers.report_runs import make_differences, make_run

# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
THEMES = ["light", "dark"]


def linear(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB."""
    x = XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, two):
    """WCAG 2's contrast ratio."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, two))
    return (high + 0.05) / (low + 0.05)


def colours(theme, count=6):
    names = [f"c{k}" for k in range(count)]
    return [palette(names, theme == "dark")[name] for name in names]


@pytest.mark.parametrize("theme", THEMES)
def test_checkpoints_differ_in_lightness_alone(theme):
    lightness = [lab(linear(colour))[0] for colour in colours(theme)]
    assert min(abs(a - b) for a, b in itertools.pairwise(lightness)) > 15
    assert min(abs(a - b) for a, b in itertools.combinations(lightness, 2)) > 8
    assert all(contrast(colour, GROUND[theme]) > 3 for colour in colours(theme)[:5])
    assert contrast(colours(theme)[5], GROUND[theme]) > 2


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", BLIND)
def test_checkpoints_differ_for_colour_blind_readers(theme, kind):
    seen = [lab(np.array(BLIND[kind]) @ linear(colour)) for colour in colours(theme)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12


def test_texts_of_the_page_can_be_read():
    style = (Path(reports.__file__).parent / "templates" / "style.css").read_text()
    pairs = re.findall(r"--([\w-]+):light-dark\((#\w+),(#\w+)\)", style)
    for named in ({name: light for name, light, _ in pairs}, {name: dark for name, _, dark in pairs}):
        assert all(contrast(named[name], named["ground"]) > 4.5 for name in ("text", "soft", "link"))
        assert contrast(named["focus"], named["ground"]) > 3 and contrast(named["text"], named["warn"]) > 4.5


@pytest.mark.parametrize("theme", THEMES)
def test_more_checkpoints_than_colours_are_ordered_by_lightness(theme):
    lightness = [lab(linear(colour))[0] for colour in colours(theme, 12)]
    assert all(b - a > 3 for a, b in itertools.pairwise(lightness))


@pytest.fixture
def paths(tmp_path):
    """Three runs; only the second and third have a metric that the first has not."""
    made = [make_run(tmp_path / name, name, layers=2, final=False) for name in ("a", "b", "c")]
    for path, drop in zip(made, ("paper", "", ""), strict=True):
        table = pd.read_csv(path / "results.csv", dtype=str, keep_default_na=False)
        table[(table["protocol"] != drop) & (table["teacher"] != "gen")].to_csv(path / "results.csv", index=False)
    return made


def drawn(figure, names):
    """Colour of every checkpoint in the legend of a figure, which all panels use."""
    looks = {line.get_label(): line.get_color() for line in figure.legends[0].get_lines()}
    for axes in figure.axes:
        assert {line.get_color() for line in axes.lines} <= {*looks.values(), "#333333"}
    return {name: colour for name, colour in looks.items() if name in names}


def test_checkpoint_looks_the_same_in_figures_and_page(paths, tmp_path):
    runs, _ = load(paths)
    names = [run.label for run in runs]
    colours = palette(names)
    differences = make_differences(names, 2)
    assert drawn(layer_plot(runs, "cosine", "strict"), names) == {name: colours[name] for name in names}
    assert drawn(layer_plot(runs[1:], "cosine", "paper", colours), names) == {name: colours[name] for name in "bc"}
    for reference in names:
        frame = difference_frame(differences_from(differences, reference), "cosine", "strict")
        assert drawn(line_plot(frame, colours=colours), names) == {n: colours[n] for n in names if n != reference}
    page = Parsed(write_report(paths, tmp_path / "report", differences).read_text())
    themes = next(json.loads(attrs["data-themes"]) for tag, attrs in page.tags if tag == "body")
    for theme in THEMES:
        scheme = [palette(names, theme == "dark")[name] for name in (*names, *REFERENCES)]
        assert themes[theme]["range"]["category"] == scheme
    for chart in page.charts():
        assert chart["encoding"]["color"]["scale"] == {"domain": [*names, *REFERENCES]}


def test_legend_of_learning_curves_names_the_probed_layers(tmp_path):
    path = make_run(tmp_path / "run", layers=8)
    curves = pd.read_csv(path / "learning_curves.csv", dtype={"layer": str})
    curves[curves["layer"].isin(["0", "2", "4", "8", "final"])].to_csv(path / "learning_curves.csv", index=False)
    legend = learning_plot(load([path])[0][0]).axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["0", "2", "4", "8", "final"]


def test_figures_for_a_paper(paths, tmp_path):
    """Column widths, letters of seven points, fonts embedded, nothing but SVG and PDF."""
    out = tmp_path / "out"
    for path in paths[1:]:  # drawing takes long, and every curve is drawn in the same way
        table = pd.read_csv(path / "results.csv", dtype=str, keep_default_na=False)
        table[(table["metric"] == "cosine") & (table["protocol"] == "strict")].to_csv(path / "results.csv", index=False)
        pd.read_csv(path / "learning_curves.csv")[:0].to_csv(path / "learning_curves.csv", index=False)
    said = CliRunner().invoke(cli, ["report", *map(str, paths[1:]), "--out", str(out), "--style", "paper"])
    assert said.exit_code == 0, said.output
    files = sorted((out / "figures").iterdir())
    assert {file.suffix for file in files if not file.name.startswith("grid_")} == {".svg", ".pdf"}
    widths = {}
    for file in (file for file in files if file.suffix == ".pdf"):
        raw = file.read_bytes()
        widths[file.stem] = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", raw)[1]) / 72
        fonts = re.findall(rb"/Type /FontDescriptor.*?endobj", raw, re.DOTALL)
        assert fonts and all(b"/FontFile2" in font for font in fonts) and b"/Type3" not in raw
    assert widths["layers_cosine_strict"] == pytest.approx(DOUBLE)
    assert widths["layers_cosine_strict_seg_ridge"] == pytest.approx(SINGLE)
    svg = (out / "figures" / "layers_cosine_strict_seg_ridge.svg").read_text()
    assert "<text" not in svg and "<path" in svg  # letters are paths: no font is needed to see them
    runs, _ = load(paths)
    double = layer_plot(runs, "cosine", "strict", paper=True)
    frame = layer_frame(runs, "cosine", "strict")
    single = line_plot(frame[(frame["teacher"] == "seg") & (frame["probe"] == "ridge")], paper=True)
    for figure in (double, single):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, *axes.get_xticklabels())]
        legend = figure.legends[0]
        assert {text.get_fontsize() for text in (*texts, *legend.get_texts())} == {7.0}
        box = legend.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        assert box.x0 >= -0.01 and box.x1 <= width + 0.01 and box.y0 >= -0.01 and box.y1 < 0.5 * height
