"""Paired differences between answers: against plain loops over the questions, with seeds, and refusals."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from analysis.benchmarks.accuracy import ScoredAnswer, summarise
from analysis.benchmarks.compare import answer_statements, compare_answers
from analysis.evaluation.scores import write_rows
from probing.utils.errors import UserError
from reports.page import write_report
from tests.helpers.cli import error_line, probing
from tests.helpers.report_runs import make_run

PLACES = [
    ("2d", "count", "ade20k"),
    ("2d", "relation", "coco"),
    ("3d", "depth", "omni3d"),
    ("3d", "distance", "omni3d"),
]


def write(path, name, scores, digest="d", suffix="auto", tokens=8, benchmark="cvbench", images="i"):
    """A finished run of `probing bench`: two questions about each image, a score each."""
    answered = [
        ScoredAnswer(str(n), dict(zip(("type", "task", "source"), PLACES[n % 4], strict=True)), f"{images}{n // 2}", "",
                 "A", ["A"], float(score), 0.5)
        for n, score in enumerate(scores)
    ]  # fmt: skip
    path.mkdir(parents=True)
    (path / "answers.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in answered))
    (path / "recipe.yaml").write_text(f"benchmark: {benchmark}\nsuffix: {suffix}\nmax_new_tokens: {tokens}\n")
    manifest = {
        "kind": "benchmark", "benchmark": benchmark, "checkpoint": {"name": name, "path": "/x", "sha256": name},
        "data": {"questions": len(answered), "digest": digest}, "unreadable": 0,
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    write_rows(path / "results.csv", name, list(summarise(benchmark, answered)))
    return path


@pytest.fixture
def scores():
    return np.random.default_rng(0).integers(0, 2, (4, 80))


def accuracy(scores):
    """CV-Bench's, by its card: the mean of 2D and 3D, and of 2D's two sources."""
    ade, coco, omni = scores[0::4].mean(), scores[1::4].mean(), np.concatenate([scores[2::4], scores[3::4]]).mean()
    return {
        "": ((ade + coco) / 2 + omni) / 2, "2d": (ade + coco) / 2, "3d": omni,
        "2d/count": ade, "2d/relation": coco, "2d/ade20k": ade, "2d/coco": coco,
        "3d/depth": scores[2::4].mean(), "3d/distance": scores[3::4].mean(),
    }  # fmt: skip


def test_differences_equal_those_of_the_accuracies(tmp_path, scores):
    paths = [write(tmp_path / name, name, row) for name, row in zip("abc", scores, strict=False)]
    table = compare_answers(paths, list("abc"))
    assert list(zip(table["checkpoint"], table["reference"], strict=True))[::9] == [("b", "a"), ("c", "a"), ("c", "b")]
    one, two = accuracy(scores[0]), accuracy(scores[2])
    found = table[(table["checkpoint"] == "c") & (table["reference"] == "a")].set_index("variant")["value"].to_dict()
    assert found == pytest.approx({part: two[part] - one[part] for part in one})
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert table.loc[table["variant"] == "", "n"].tolist() == [80] * 3


def test_common_errors_do_not_widen_the_interval(tmp_path, scores):
    """The same answers but for four questions about two images: paired, only those count."""
    other = scores[0].copy()
    other[[2, 3, 42, 43]] = 1 - other[[2, 3, 42, 43]]
    table = compare_answers([write(tmp_path / "a", "a", scores[0]), write(tmp_path / "b", "b", other)], ["a", "b"])
    row = table[table["variant"] == "3d"].iloc[0]
    rng = np.random.default_rng(1)
    changed = (other - scores[0]).reshape(-1, 2)[1::2]  # images of 3D, two questions each
    drawn = [changed[rng.integers(0, len(changed), len(changed))].mean() for _ in range(4000)]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    assert table[table["variant"] == "2d"][["value", "ci_low", "ci_high"]].to_numpy().ravel() == pytest.approx(0)


def seeds(folder, rows, names=("seed_0", "seed_1", "seed_2")):
    for name, row in zip(names, rows, strict=False):
        write(folder / name, "ift", row)
    return folder


def test_seeds_of_the_same_name_are_pairs(tmp_path):
    """Three trainings that differ much from each other, and from their pairs by one question each."""
    rng = np.random.default_rng(3)
    base = np.stack([rng.random(80) < share for share in (0.2, 0.5, 0.8)]).astype(int)
    better = base.copy()
    for row in better:
        row[np.flatnonzero((row == 0) & (np.arange(80) % 4 >= 2))[:2]] = 1  # two of the 40 questions of 3D
    paths = [seeds(tmp_path / "base", base), seeds(tmp_path / "ola", better)]
    row = compare_answers(paths, ["base", "ola"])[lambda t: t["variant"] == "3d"].iloc[0]
    assert row["value"] == pytest.approx(2 / 40) and (row["seeds"], row["higher"]) == ("3, 3", "3 of 3")
    width = row["ci_high"] - row["ci_low"]
    apart = [paths[0], seeds(tmp_path / "other", better, names=("x", "y", "z"))]
    row = compare_answers(apart, ["base", "ola"])[lambda t: t["variant"] == "3d"].iloc[0]
    assert row["value"] == pytest.approx(2 / 40) and (row["seeds"], row["higher"]) == ("3, 3", "")
    assert row["ci_high"] - row["ci_low"] > 3 * width  # then the spread of the trainings counts
    assert "and 3 and 3 seeds" in answer_statements(compare_answers(apart, ["base", "ola"]))[0]


def test_equal_sums_in_another_order_are_not_higher(tmp_path):
    """Scores such as 0.3 add up to other last bits in another order."""
    rng = np.random.default_rng(0)
    rows = [rng.choice([0, 0.3, 0.6, 0.9, 1], 80) for _ in range(2)]
    for row in rows:
        row[3::4] = row[2::4]
    paths = [seeds(tmp_path / "a", rows), seeds(tmp_path / "b", [row.reshape(-1, 4)[::-1].ravel() for row in rows])]
    table = compare_answers(paths, ["a", "b"])
    assert table["value"].to_numpy() == pytest.approx(0) and set(table["higher"]) == {"0 of 2"}


def test_other_questions_or_settings_are_refused(tmp_path, scores):
    first = write(tmp_path / "a", "a", scores[0])
    for name, other, said in (
        ("b", {"digest": "other"}, "have different questions"),
        ("c", {"images": "j"}, "different questions or images"),
        ("d", {"suffix": "short"}, r"differ in suffix \('auto' and 'short'\)"),
        ("e", {"tokens": 9}, r"differ in max_new_tokens \(8 and 9\)"),
        ("f", {"benchmark": "realworldqa"}, "a is the only run of CV-Bench"),
    ):
        with pytest.raises(UserError, match=said):
            compare_answers([first, write(tmp_path / name, name, scores[1], **other)], ["a", name])
    mixed = seeds(tmp_path / "seeds", scores[:1])
    write(mixed / "seed_1", "ift", scores[1], digest="other")
    with pytest.raises(UserError, match="have different questions"):
        compare_answers([mixed, first], ["seeds", "a"])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("answers.jsonl", "{}\n", r"answers\.jsonl cannot be read"),
        ("recipe.yaml", None, "has no recipe.yaml; put it back"),
        ("answers.jsonl", "", r"answers\.jsonl cannot be read \(ValueError: 0 answers to 80 questions"),
        ("manifest.json", None, "has not finished; run its probing bench again"),
    ],
)
def test_broken_runs_are_named(tmp_path, scores, file, content, said):
    paths = [write(tmp_path / name, name, row) for name, row in zip("ab", scores[:2], strict=True)]
    (paths[1] / file).unlink() if content is None else (paths[1] / file).write_text(content)
    with pytest.raises(UserError, match=said):
        compare_answers(paths, ["a", "b"])


def test_several_benchmarks_stay_separate(tmp_path, scores):
    runs = [
        write(tmp_path / f"{name}{benchmark}", name, row, benchmark=benchmark)
        for name, row in zip("ab", scores[:2], strict=True)
        for benchmark in ("cvbench", "realworldqa")
    ]
    table = compare_answers(runs, list("aabb"))
    assert table["protocol"].value_counts().to_dict() == {"cvbench": 9, "realworldqa": 1}
    assert set(zip(table["checkpoint"], table["reference"], strict=True)) == {("b", "a")}


def test_command_prints_and_page_shows_differences(tmp_path, scores):
    worse, better = np.zeros(80, dtype=int), np.ones(80, dtype=int)
    runs = [write(tmp_path / name, name, row) for name, row in (("a", worse), ("b", better), ("c", scores[0]))]
    said = probing("compare", *runs, "--out", tmp_path / "out")
    assert said.exit_code == 0
    expected = (
        "CV-Bench-like (80 questions), Overall: accuracy of b - a = +1.0000 [+1.0000, +1.0000] over the images of 80 "
    )
    assert expected + "questions: b answers better" in said.output
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "paired differences</caption>" in page and "b − a" in page and "+1.000 [+1.000, +1.000]" in page
    assert "every difference in differences.csv" in page
    table = pd.read_csv(tmp_path / "out" / "differences.csv", keep_default_na=False)
    assert set(table["metric"]) == {"accuracy"} and len(table) == 3 * 9


def test_command_refuses_before_it_works(tmp_path, scores):
    runs = [write(tmp_path / name, name, row) for name, row in zip("ab", scores[:2], strict=True)]
    probed = make_run(tmp_path / "probed")
    (probed / "recipe.yaml").write_text("x: 1\n")
    before = {run: (run / "results.csv").read_bytes() for run in runs}
    for arguments, out, said in (
        ([runs[0], runs[1]], runs[1], "b contains runs, and the report would overwrite their results"),
        ([runs[0], runs[1]], tmp_path, "contains runs"),
        ([runs[0], tmp_path / "b" / ".." / "a"], tmp_path / "new" / "out", "is given twice"),
        ([probed, *runs], tmp_path / "new" / "out", "probed is the only run with probes"),
    ):
        assert said in error_line("compare", *arguments, "--out", out)
    with pytest.raises(UserError, match="contains runs"):
        write_report(runs, runs[0])
    assert before == {run: (run / "results.csv").read_bytes() for run in runs} and not (tmp_path / "new").exists()


def test_half_of_a_benchmark_is_labelled_as_such(tmp_path, scores):
    halves = [write(tmp_path / name, name, row) for name, row in zip("ab", scores[:2], strict=True)]
    for run in halves:
        lines = [line for line in (run / "answers.jsonl").read_text().splitlines() if '"3d"' in line]
        (run / "answers.jsonl").write_text("\n".join(lines) + "\n")
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["data"]["questions"] = len(lines)
        (run / "manifest.json").write_text(json.dumps(manifest))
    sentences = answer_statements(compare_answers(halves, ["a", "b"]))
    assert len(sentences) == 1 and sentences[0].startswith("CV-Bench-like (40 questions), 3D: accuracy of b - a = ")
