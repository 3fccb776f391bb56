"""The chapter on benchmarks, from made-up runs: what is joined, drawn and said must be what the tables hold."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from probing.utils.errors import UserError
from reports.benchmarks import chapter, comparability_warnings, load_benchmarks, panels, quality_plot
from reports.page import write_report
from reports.results import load_runs
from reports.theme import palette
from tests.helpers.charts import Parsed
from tests.helpers.report_runs import COLUMNS, make_run

ACCURACY = [0.41, 0.52, 0.5, 0.63, 0.7]
LIFTS = [0.0, 0.02, 0.05, 0.03, 0.09]
"""Of the curves of as many checkpoints; `make_run`'s fall by 0.01 a layer from 0.5."""


def make_bench(path, name, accuracy, sha, unread=0, questions=2638):
    benchmark = "cvbench"
    path.mkdir(parents=True)
    rows = []
    for part, lift in (("", 0.0), ("2d", 0.1), ("2d/count", 0.2)):
        place = [name, "", "", ""]
        value = accuracy + lift
        rows.append(
            [*place, "none", "accuracy", benchmark, part, "test", 0, value, value - 0.03, value + 0.04, 99, 0.25]
        )
        rows.append([*place, "none", "unreadable", benchmark, part, "test", 0, unread / 99, 0, 0.1, 99, ""])
    pd.DataFrame(rows, columns=COLUMNS).to_csv(path / "results.csv", index=False)
    manifest = {
        "kind": "benchmark", "benchmark": benchmark, "checkpoint": {"name": name, "path": "/x", "sha256": sha},
        "data": {"questions": questions, "digest": "d"}, "unreadable": unread,
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "recipe.yaml").write_text("benchmark: cvbench\n")
    return path


def make_probed(path, name, lift, sha):
    make_run(path, name, layers=12)
    (path / "recipe.yaml").write_text("x: 1\n")
    results = pd.read_csv(path / "results.csv", dtype={"layer": str}, keep_default_na=False)
    results.loc[results["probe"] == "resampler", ["value", "ci_low", "ci_high"]] += lift
    results.to_csv(path / "results.csv", index=False)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["checkpoint"] |= {"sha256": sha}
    manifest["data"] |= {"eval_digest": "e", "train_digest": "t"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def runs(tmp_path):
    """Five checkpoints with both, one with probes alone and one with answers alone, in another order."""
    probed = [make_probed(tmp_path / f"p{n}", f"c{n}", lift, f"sha{n}") for n, lift in enumerate([*LIFTS, 0.2])]
    bench_runs = [make_bench(tmp_path / f"b{n}", f"c{n}", a, f"sha{n}") for n, a in enumerate(ACCURACY)]
    return probed, [make_bench(tmp_path / "b9", "c9", 0.9, "sha9", unread=7), *reversed(bench_runs)]


def test_checkpoints_are_joined_by_their_weights(runs):
    probed, bench_runs = runs
    found = panels(load_runs(probed), load_benchmarks(bench_runs))
    assert {(p.teacher, p.probe) for p in found} == {
        (t, p) for t in ("depth", "seg", "gen") for p in ("resampler", "ridge")
    }
    panel = next(p for p in found if (p.teacher, p.probe) == ("depth", "resampler"))
    assert list(panel.points["checkpoint"]) == [f"c{n}" for n in range(5)]
    assert panel.points["accuracy"].tolist() == pytest.approx(ACCURACY)
    middle = 0.5 - 0.01 * 6  # layers 3 to 9 of 12
    assert panel.points["quality"].tolist() == pytest.approx([middle + lift for lift in LIFTS])
    assert set(panel.points["layers"]) == {"3 4 5 6 7 8 9"}
    assert panel.correlation.rho.value == pytest.approx(stats.spearmanr(LIFTS, ACCURACY).statistic)
    assert panel.correlation.tau.value == pytest.approx(stats.kendalltau(LIFTS, ACCURACY).statistic)
    flat = next(p for p in found if (p.teacher, p.probe) == ("seg", "ridge"))  # the same for all checkpoints
    assert flat.correlation is None and "the same for all 5 checkpoints" in flat.sentence


def test_points_are_drawn_where_the_tables_have_them(runs):
    probed, bench_runs = runs
    found = [p for p in panels(load_runs(probed), load_benchmarks(bench_runs)) if p.correlation]
    colours = palette(list(found[0].points["checkpoint"]))
    figure = quality_plot(found, colours)
    for axes, panel in zip(figure.axes, found, strict=True):
        points = panel.points.sort_values("quality")
        offsets = np.asarray(axes.collections[0].get_offsets())
        assert np.allclose(offsets[offsets[:, 0].argsort()], points[["quality", "accuracy"]])
        ends = np.sort([segment[:, 1] for segment in axes.collections[1].get_segments()], axis=0)
        assert np.allclose(ends, np.sort(points[["ci_low", "ci_high"]], axis=0))
        assert "ρ = +0.70, 5 checkpoints" in axes.get_title("left").replace("\n", " ")


def test_page_has_accuracies_and_the_number_of_checkpoints(runs, tmp_path):
    probed, bench_runs = runs
    page = write_report([*probed[:3], *bench_runs], tmp_path / "report").read_text(encoding="utf-8")
    assert (
        "<caption>CV-Bench</caption>" in page
        and "2D, Count" in page
        and "0.700 [0.670, 0.740], n = 99" in page
        and "chance" in page
    )
    assert "c9: 7 of 2638 answers could not be parsed and count as wrong." in page
    rho = stats.spearmanr(LIFTS[:3], ACCURACY[:3]).statistic
    assert f"Spearman&#39;s ρ = {rho:+.2f}" in page and "over 3 checkpoints" in page
    assert "With fewer than 8 checkpoints this is weak evidence" in page
    points = pd.read_csv(tmp_path / "report" / "quality_accuracy.csv")
    assert len(points) == 3 * 6 and set(points["benchmark"]) == {"cvbench"}
    merged = pd.read_csv(tmp_path / "report" / "results.csv", keep_default_na=False)
    assert (merged["metric"] == "accuracy").sum() == 6 * 3


def test_runs_of_a_folder_of_seeds_have_their_colours_and_names(tmp_path):
    """The folder is one line of the curves, and its checkpoints are points of their own in the chart and its legend."""
    seeds = [make_probed(tmp_path / "seeds" / f"p{n}", f"c{n}", lift, f"sha{n}") for n, lift in enumerate(LIFTS[:3])]
    shutil.copy(seeds[0] / "results.csv", tmp_path / "seeds")
    asked = [make_bench(tmp_path / f"b{n}", f"c{n}", a, f"sha{n}") for n, a in enumerate(ACCURACY[:3])]
    page = Parsed(write_report([tmp_path / "seeds", *asked], tmp_path / "report").read_text(encoding="utf-8"))
    names = {"c0", "c1", "c2"}
    chart = page.charts()[-1]
    assert set(chart["rows"]["checkpoint"]) == names <= {*chart["encoding"]["color"]["scale"]["domain"]}
    assert names <= {attrs["data-name"] for _, attrs in page.tags if "data-name" in attrs}


def test_no_correlation_of_two(runs):
    probed, bench_runs = runs
    found = panels(load_runs(probed[:2]), load_benchmarks(bench_runs))
    assert all(panel.correlation is None for panel in found)
    assert "2 checkpoints have both probes and answers; a rank correlation needs 3" in found[0].sentence
    assert not panels(load_runs(probed[5:]), load_benchmarks(bench_runs))


def test_runs_probed_on_other_images_are_named(runs):
    probed, _ = runs
    assert not comparability_warnings(load_runs(probed))
    manifest = json.loads((probed[1] / "manifest.json").read_text())
    manifest["data"]["eval_digest"] = "others"
    (probed[1] / "manifest.json").write_text(json.dumps(manifest))
    assert (
        "differ in their held-out images: their qualities cannot be compared"
        in comparability_warnings(load_runs(probed))[0]
    )


def test_benchmarks_alone_have_a_page(runs, tmp_path):
    _, bench_runs = runs
    page = write_report(bench_runs, tmp_path / "report").read_text(encoding="utf-8")
    assert "How many questions are answered correctly?" in page and "<title>c9, c4" in page and "Spearman" not in page


def test_a_run_without_results_is_named(runs, tmp_path):
    _, bench_runs = runs
    (bench_runs[0] / "results.csv").unlink()
    with pytest.raises(UserError, match="b9 has no results; repeat its probing bench command"):
        write_report(bench_runs, tmp_path / "report")
    with pytest.raises(UserError, match="is a run of probing bench"):
        load_runs(bench_runs[1:])


def test_more_checkpoints_say_more(tmp_path):
    """Twelve in order: no warning, and an interval above zero."""
    rng = np.random.default_rng(0)
    order = np.sort(rng.uniform(0, 0.3, 12))
    probed = [make_probed(tmp_path / f"p{n}", f"c{n}", x, f"s{n}") for n, x in enumerate(order)]
    bench_runs = [make_bench(tmp_path / f"b{n}", f"c{n}", 0.3 + x, f"s{n}") for n, x in enumerate(order)]
    panel = panels(load_runs(probed), load_benchmarks(bench_runs))[0]
    assert panel.correlation.rho.low > 0.9 and "weak evidence" not in panel.sentence and "over 12" in panel.sentence


def test_other_questions_are_not_called_by_the_benchmarks_name(tmp_path):
    runs = load_benchmarks([make_bench(tmp_path / "b", "c", 0.5, "s", questions=587)])
    (one,) = chapter([], runs, [], ["c"])["tables"]
    assert one["title"] == "CV-Bench-like (587 questions)"
    assert "Not CV-Bench as published, which has 2638 questions" in one["notes"][0]
    assert list(one["table"]["part"]) == ["Overall", "2D", "2D, Count"]


def test_reports_of_benchmarks_need_no_torch():
    code = "import sys, reports.benchmarks, analysis.benchmarks.rank_correlation; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
