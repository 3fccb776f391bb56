"""What the page holds: the numbers of results.csv, names as text, and no more than five megabytes."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from reports.charts import final_position, layer_ticks
from reports.differences import differences_from, references
from reports.page import load, render, write_report
from reports.plots import WIDTH, nice_ticks
from reports.results import read_results
from tests.helpers.report_runs import add_rows, make_differences, make_run, wide_pictures


class Parsed(HTMLParser):
    """Every tag with its attributes, as a browser reads them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)

    def plots(self):
        return [json.loads(attrs["data-plot"]) for tag, attrs in self.tags if "data-plot" in attrs]


def test_page_has_the_numbers_of_the_table(tmp_path):
    """Of every curve, control and level, by the place that the page says they are of."""
    paths = [make_run(tmp_path / name, name, layers=5, random=0.3 + 0.1 * k) for k, name in enumerate(("a", "b"))]
    page = Parsed(write_report(paths, tmp_path / "report").read_text())
    table = read_results(tmp_path / "report" / "results.csv")
    titles = {"Depth": "depth", "Segmentation": "seg", "Generation": "gen"}
    probes = {"Perceiver resampler": "resampler", "ridge readout": "ridge"}
    measures = [("cosine_centred", "strict"), ("cosine", "strict"), ("cosine", "paper")]
    plots = page.plots()
    assert len(plots) == 3 * 6
    compared = 0
    for number, plot in enumerate(plots):
        teacher, probe = plot["title"].split(", ")
        metric, protocol = measures[number // 6]
        mine = table[(table["teacher"] == titles[teacher]) & (table["metric"] == metric)]
        mine = mine[mine["protocol"] == protocol]
        for line in plot["lines"]:
            control, _, name = line["name"].rpartition(", ")
            kind = {"": "none", "random weights": "random", "shuffled pairs": "shuffled"}[control]
            rows = mine[(mine["checkpoint"] == name) & (mine["probe"] == probes[probe]) & (mine["control"] == kind)]
            rows = rows.set_index("layer").loc[plot["labels"]]
            for key, column in (("value", "value"), ("low", "ci_low"), ("high", "ci_high")):
                assert line[key] == pytest.approx(rows[column].tolist(), rel=1e-5)
                compared += len(line[key])
        (mean,) = plot["levels"]
        floor = mine[(mine["probe"] == "constant") & (mine["checkpoint"] == "a")]["value"]
        assert mean["value"] == pytest.approx(float(floor.iloc[0]), abs=1e-6)
    curves = table[(table["probe"] != "constant")]
    assert compared == 3 * len(curves)  # none of the table is missing


def test_drawn_values_equal_shown_values(tmp_path):
    """Heights of a drawn line are proportional to its values."""
    runs, _ = load([make_run(tmp_path / "run", layers=6)])
    page = render(runs, [])
    figure = re.search(r"<figure class=\"plot\" data-plot='(.*?)'>(.*?)</figure>", page, re.DOTALL)
    data = json.loads(figure[1])
    drawn = re.search(r'<g data-name="tiny">.*?class="line k0" .*?d="M(.*?)"', figure[2], re.DOTALL)[1]
    points = [tuple(map(float, point.split())) for point in drawn.split("L")]
    line = data["lines"][0]
    assert [x for x, _ in points] == pytest.approx(data["x"][:-1], abs=0.11)  # `final` is separate
    (_, first), (_, last) = points[0], points[-1]
    for (_, y), value in zip(points, line["value"], strict=False):
        share = (value - line["value"][0]) / (line["value"][6] - line["value"][0])
        assert y == pytest.approx(first + share * (last - first), abs=0.2)
    assert first < last  # larger is higher


def test_differences_can_be_seen_from_every_checkpoint():
    names = ["a", "b", "c"]
    table = make_differences(names, 4)
    assert references(table) == names
    for one in names:
        seen = differences_from(table, one)
        assert set(seen["reference"]) == {one} and list(dict.fromkeys(seen["checkpoint"])) == sorted({*names} - {one})
        assert (seen["ci_low"] <= seen["value"]).all() and (seen["value"] <= seen["ci_high"]).all()
    place = ["teacher", "layer", "probe", "metric", "protocol"]
    there = differences_from(table, "a")[lambda t: t["checkpoint"] == "b"]
    back = differences_from(table, "b")[lambda t: t["checkpoint"] == "a"]
    both = there.merge(back, on=place, suffixes=("", "_back"))
    assert len(both) == len(there) and (both["value"] == -both["value_back"]).all()
    assert (both["ci_low"] == -both["ci_high_back"]).all() and (both["ci_high"] == -both["ci_low_back"]).all()


@pytest.mark.slow
def test_large_page_is_under_five_megabytes(tmp_path):
    """Every metric there is, both probes, four pictures a layer, and differences of every pair."""
    paths = [make_run(tmp_path / f"run{k}", f"model {k}", layers=32, random=0.3 + 0.1 * k) for k in range(3)]
    decoded = [("da2k", "strict", "depth"), *(("miou", p, "seg") for p in ("blind", "strict", "paper"))]
    decoded += [("fid", "strict", "gen"), ("kid", "strict", "gen")]
    layers = [str(layer) for layer in range(33)]
    wide_pictures(paths[0], side=128)
    for path in paths[1:]:
        shutil.copytree(paths[0] / "pictures", path / "pictures")
    for path in paths:
        for metric, protocol, teacher in decoded:
            kinds = [(probe, control) for probe in ("resampler", "ridge") for control in ("none", "random")]
            rows = [(layer, *kind, 0.4 + 0.001 * int(layer), 0.01) for layer in layers for kind in kinds]
            rows += [("", "constant", "mean", 0.08, 0.0), ("", "target", "teacher", 0.52, 0.0)]
            add_rows(path, metric, protocol, teacher, rows)
    runs, _ = load(paths)
    page = render(runs, [], make_differences([run.label for run in runs], 32), ["one"])
    assert len(page.encode()) < 5_000_000
    parsed = Parsed(page)
    strips = [attrs for tag, attrs in parsed.tags if tag == "div" and "data-layer" in attrs]
    assert len(strips) == 3 * 33 * 3 * 2  # every layer of every checkpoint, teacher and probe
    sources = [attrs["src"] for tag, attrs in parsed.tags if tag == "img"]
    assert all(source.startswith("data:image/") for source in sources)
    assert all(attrs["href"].startswith("#") for tag, attrs in parsed.tags if "href" in attrs)
    assert "@import" not in page and "url(" not in page.replace("url(#", "")
    assert len(parsed.plots()) == (9 + 6) * 2 + 3 * 3 * 6


ATTACKS = [
    "</script><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "' onfocus=alert(1) x='",
    "</style><style>*{display:none}",
    "{{ 7 * 7 }}{% raw %}",
    "</figure></svg><iframe src=javascript:alert(1)>",
    "url(#x);}</textarea><!--",
    "a\u2028b\u202e\x0c&#39;&quot;",
]


def named_page(root, name):
    """A page with a name wherever a name goes; without learning curves, which are slow to draw and hold no name."""
    path, other = make_run(root / "run", name, layers=1), make_run(root / "other", "other", layers=1)
    for one in (path, other):
        table = pd.read_csv(one / "results.csv", dtype=str, keep_default_na=False)
        table[table["metric"] == "cosine_centred"].to_csv(one / "results.csv", index=False)
    wide_pictures(path, layers=1, side=16, images=1)
    (path / "pictures" / "classes.json").write_text(json.dumps([name] * 10))
    runs, _ = load([path, other])
    runs = [replace(run, curves=run.curves.iloc[:0]) for run in runs]
    return Parsed(render(runs, [], make_differences([name, "other"], 1), [name]))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    return named_page(tmp_path_factory.mktemp("harmless"), "harmless")


@pytest.mark.parametrize("name", ATTACKS)
def test_name_is_only_text_in_scripts_attributes_and_drawings(tmp_path, harmless, name):
    """The page has the same tags, attributes and scripts as with a harmless name; the name is in it unchanged."""
    hostile = named_page(tmp_path, name)
    assert [(tag, list(attrs)) for tag, attrs in hostile.tags] == [(tag, list(attrs)) for tag, attrs in harmless.tags]
    assert hostile.scripts == harmless.scripts and len(hostile.scripts) == 2
    styles = [[attrs.get("style") for _, attrs in page.tags] for page in (hostile, harmless)]
    assert styles[0] == styles[1]
    assert any(line["name"] == name for plot in hostile.plots() for line in plot["lines"])
    assert any(attrs.get("data-name") == name for _, attrs in hostile.tags)


@pytest.mark.parametrize("depth", [1, 2, 6, 12, 24, 28, 32, 40, 80])
def test_names_of_layers_do_not_run_into_each_other(depth):
    ticks, names = layer_ticks(depth, final=True)
    letters = (WIDTH - 60) / (final_position(depth) * 1.05) / 7  # a place in letters of the axis
    for (a, one), (b, two) in itertools.pairwise(zip(ticks, names, strict=True)):
        assert (b - a) * letters > (len(one) + len(two)) / 2
    assert names[-1] == "final" and len(names) < 12


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.013, 0.002), (17.0, 5012.0), (0.3, 0.3), (1e-9, 2e-9)])
def test_ticks_are_round_and_within_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7 and all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    steps = {f"{b - a:.3e}" for a, b in itertools.pairwise(ticks)}
    assert len(steps) <= 1 and all(step[:5] in ("1.000", "2.000", "2.500", "5.000") for step in steps)
