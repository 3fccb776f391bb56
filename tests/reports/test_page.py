"""What the page holds: the numbers of results.csv, names as text, and no more than five megabytes."""

import itertools
import json
import re
import shutil

import altair as alt
import pandas as pd
import pytest
import vl_convert

from reports.charts import bundle, line_chart
from reports.curves import PROBES, differences_from, layer_ticks, references, with_positions
from reports.page import load, write_report
from reports.results import read_results
from reports.theme import CONTROLS, MEAN
from tests.helpers.charts import Parsed
from tests.helpers.report_runs import add_rows, make_differences, make_run, wide_pictures

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_charts_have_the_numbers_of_the_table(tmp_path):
    """Of every curve, control and level: what is shown at the pointer is in results.csv, and nothing is missing."""
    paths = [make_run(tmp_path / name, name, layers=5, random=0.3 + 0.1 * k) for k, name in enumerate(("a", "b"))]
    page = Parsed(write_report(paths, tmp_path / "report").read_text())
    table = read_results(tmp_path / "report" / "results.csv")
    titles = {"Depth": "depth", "Segmentation": "seg", "Generation": "gen"}
    probes = {name: probe for probe, name in PROBES.items()}
    measures = [("cosine_centred", "strict"), ("cosine", "strict"), ("cosine", "paper")]
    minus, curves = page.charts()[:3], page.charts()[3:]
    assert len(curves) == 3 * 6 and [chart["title"] for chart in minus] == [f"{t}, ridge readout" for t in titles]
    compared = 0
    for number, chart in enumerate(curves):
        teacher, probe = chart["title"].split(", ")
        metric, protocol = measures[number // 6]
        mine = table[(table["teacher"] == titles[teacher]) & (table["metric"] == metric)]
        mine = mine[mine["protocol"] == protocol]
        shown = chart["rows"]
        assert set(shown["layer"]) == {*"012345", "final"}
        for (name, control), line in shown.groupby(["checkpoint", "control"]):
            if name == MEAN:
                floor = mine[(mine["probe"] == "constant") & (mine["checkpoint"] == "a")]["value"].item()
                assert line["value"].tolist() == pytest.approx([floor] * 7)
                continue
            kind = {title: key for key, title in CONTROLS.items()}[control]
            rows = mine[(mine["checkpoint"] == name) & (mine["probe"] == probes[probe]) & (mine["control"] == kind)]
            rows = rows.set_index("layer").loc[line["layer"]]
            for column in ("value", "ci_low", "ci_high", "n"):
                assert line[column].tolist() == pytest.approx(rows[column].tolist(), rel=1e-5)
                compared += len(line)
    assert compared == 4 * (table["probe"] != "constant").sum()  # none of the table is missing
    for chart in minus:  # both fall alike, so that the difference is the same everywhere
        difference = chart["rows"].set_index(["checkpoint", "layer"])["value"]
        assert difference["a"].tolist() == pytest.approx([0.3] * 7) and difference["b"].tolist() == pytest.approx(
            [0.2] * 7
        )


def test_charts_are_valid_and_drawn_by_vega(tmp_path):
    """Lines have a point per layer, `final` is separate, and a hidden name is not drawn."""
    page = Parsed(write_report([make_run(tmp_path / "run", layers=6)], tmp_path / "report").read_text())
    chart = next(one for one in page.charts() if one["title"] == "Depth, Perceiver resampler")
    spec = {key: value for key, value in chart.items() if key != "rows"} | {"width": 300}
    alt.LayerChart.from_dict(spec)  # raises where the schema does not allow it

    def lines(hidden):
        params = [one | {"value": hidden} if one["name"] == "hidden" else one for one in spec["params"]]
        return vl_convert.vegalite_to_svg(spec | {"params": params}).count('<path aria-label="x: ')

    before = lines([])
    assert before > lines(["random weights"]) > lines(["random weights", "shuffled pairs"]) > lines(["tiny"])
    positions = chart["rows"].drop_duplicates("x").set_index("layer")["x"]
    assert [positions[str(k)] for k in range(7)] == [*range(7)] and positions["final"] > 6


def test_a_single_point_has_its_interval():
    """One probed layer, or `final` next to others: a band needs two points."""
    for layers, rules in ((["7"], 1), (["6", "7"], 0), (["6", "7", "final"], 1)):
        frame = pd.DataFrame({"layer": layers, "checkpoint": "a", "control": "checkpoint", "value": 0.5, "n": 9})
        chart = line_chart(with_positions(frame.assign(ci_low=0.4, ci_high=0.6)), "depth", ["a"])
        drawn = vl_convert.vegalite_to_svg(chart | {"width": 300})
        assert drawn.count('aria-roledescription="rule mark"') == rules


def test_several_runs_are_not_described_by_the_first(tmp_path):
    """Other numbers of images are named, and what every seed skips counts once."""
    paths = [make_run(tmp_path / "seeds" / name, layers=1) for name in ("s0", "s1")]
    for path in paths:
        (path / "recipe.yaml").write_text("x: 1\n")
    shutil.copy(paths[0] / "results.csv", tmp_path / "seeds")
    other = make_run(tmp_path / "other", "other", layers=1)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["data"] |= {"train_images": 11}
    (other / "manifest.json").write_text(json.dumps(manifest))
    page = write_report([tmp_path / "seeds", other], tmp_path / "report").read_text()
    assert "9 or 11 training and 50 held-out images" in page and page.count("1 images: bad.jpg") == 2
    page = write_report(
        [tmp_path / "seeds", other], tmp_path / "report", make_differences(["seeds", "other"], 1)
    ).read_text()
    assert "For a checkpoint with one training, the intervals are over images" in page


def test_other_weights_have_another_label(tmp_path):
    """A run of `align` shares the label of the checkpoint it measured, not that of another one with the same name."""
    probed = make_run(tmp_path / "probed", "llava", layers=1)
    for folder, sha in (("same", "s"), ("fork", "t")):
        manifest = {"kind": "alignment", "checkpoint": {"name": "llava", "path": "/models/x", "sha256": sha}}
        aligned = make_run(tmp_path / folder, layers=1)
        (aligned / "manifest.json").write_text(json.dumps(manifest))
        (aligned / "recipe.yaml").write_text("coverage: 0.5\n")
    for folder, label in (("same", "llava"), ("fork", "llava (fork)")):
        runs, (one,) = load([probed, tmp_path / folder])
        assert [run.label for run in runs] == ["llava"] and one.label == label


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
    """Every metric, both probes, four pictures a layer, differences of every pair; three megabytes without pictures."""
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
    differences = make_differences([f"model {k}" for k in range(3)], 32)
    page = write_report(paths, tmp_path / "report", differences, ["one"]).read_text()
    assert len(page.encode()) < 5_000_000
    assert len(re.sub(r'"data:image/webp[^"]*"', "", page).encode()) < 3_000_000
    parsed = Parsed(page)
    strips = [attrs for tag, attrs in parsed.tags if tag == "div" and "data-layer" in attrs]
    assert len(strips) == 3 * 33 * 3 * 2  # every layer of every checkpoint, teacher and probe
    sources = [attrs["src"] for tag, attrs in parsed.tags if tag == "img"]
    assert all(source.startswith("data:image/") for source in sources)
    assert all(attrs["href"].startswith("#") for tag, attrs in parsed.tags if "href" in attrs)
    own = page.replace(bundle(), "")
    assert len(page) - len(own) == len(bundle())  # once
    assert "@import" not in own and "url(" not in own
    assert len(parsed.charts()) == 3 + (9 + 6) * 2 + 3 * 6


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
        pd.read_csv(one / "learning_curves.csv")[:0].to_csv(one / "learning_curves.csv", index=False)
    wide_pictures(path, layers=1, side=16, images=1)
    (path / "pictures" / "classes.json").write_text(json.dumps([name] * 10))
    page = write_report([path, other], root / "report", make_differences([name, "other"], 1), [name])
    return Parsed(page.read_text())


@pytest.fixture(scope="module")
def harmless(tmp_path_factory, without_pictures):
    return named_page(tmp_path_factory.mktemp("harmless"), "harmless")


@pytest.mark.parametrize("name", ATTACKS)
def test_name_is_only_text_in_scripts_attributes_and_drawings(tmp_path, harmless, name):
    """The page has the same tags, attributes and scripts as with a harmless name; the name is in it unchanged."""
    hostile = named_page(tmp_path, name)
    assert [(tag, list(attrs)) for tag, attrs in hostile.tags] == [(tag, list(attrs)) for tag, attrs in harmless.tags]
    assert hostile.scripts == harmless.scripts
    styles = [[attrs.get("style") for _, attrs in page.tags] for page in (hostile, harmless)]
    assert styles[0] == styles[1]
    assert any(name in set(chart["rows"]["checkpoint"]) for chart in hostile.charts())
    assert any(attrs.get("data-name") == name for _, attrs in hostile.tags)


@pytest.mark.parametrize("depth", [1, 2, 6, 9, 12, 24, 28, 32, 40, 80])
def test_layer_ticks_are_even_and_final_is_apart(depth):
    frame = with_positions(pd.DataFrame({"layer": [*map(str, range(depth + 1)), "final"]}))
    ticks = layer_ticks(frame)
    (*_, last), (end, name) = ticks[:-1], ticks[-1]
    steps = {b - a for (a, _), (b, _) in itertools.pairwise(ticks[:-1])}
    assert name == "final" and len(ticks) <= 10 and len(steps) <= 1 and ticks[0] == (0, "0")
    assert all(str(x) == layer for x, layer in ticks[:-1])
    assert end - last[0] >= max(1, round(0.1 * depth))
