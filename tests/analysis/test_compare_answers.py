"""Paired differences between answers: against plain loops over the questions, with seeds, and refusals."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from analysis.accuracies import Answered, summarise
from analysis.compare_answers import answer_statements, compare_answers
from analysis.scores import write_rows
from probing.cli import cli
from probing.errors import UserError

PLACES = [
    ("2d", "count", "ade20k"),
    ("2d", "relation", "coco"),
    ("3d", "depth", "omni3d"),
    ("3d", "distance", "omni3d"),
]


def write(path, name, scores, digest="d", suffix="auto", benchmark="cvbench"):
    """A finished run of `probing bench`: two questions about each image, a score each."""
    answered = [
        Answered(str(n), dict(zip(("type", "task", "source"), PLACES[n % 4], strict=True)), str(n // 2), "", "A", ["A"],
                 float(score), 0.5)
        for n, score in enumerate(scores)
    ]  # fmt: skip
    path.mkdir(parents=True)
    (path / "answers.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in answered))
    (path / "recipe.yaml").write_text(f"suffix: {suffix}\nmax_new_tokens: 8\n")
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
        "cvbench": ((ade + coco) / 2 + omni) / 2, "cvbench/2d": (ade + coco) / 2, "cvbench/3d": omni,
        "cvbench/2d/count": ade, "cvbench/2d/relation": coco, "cvbench/2d/ade20k": ade, "cvbench/2d/coco": coco,
        "cvbench/3d/depth": scores[2::4].mean(), "cvbench/3d/distance": scores[3::4].mean(),
    }  # fmt: skip


def test_differences_are_those_of_the_accuracies(tmp_path, scores):
    paths = [write(tmp_path / name, name, row) for name, row in zip("abc", scores, strict=False)]
    table = compare_answers(paths)
    assert list(zip(table["checkpoint"], table["reference"], strict=True))[::9] == [("b", "a"), ("c", "a"), ("c", "b")]
    one, two = accuracy(scores[0]), accuracy(scores[2])
    found = table[(table["checkpoint"] == "c") & (table["reference"] == "a")].set_index("protocol")["value"].to_dict()
    assert found == pytest.approx({part: two[part] - one[part] for part in one})
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert table.loc[table["protocol"] == "cvbench", "n"].tolist() == [80] * 3


def test_what_both_get_wrong_alike_does_not_widen_the_interval(tmp_path, scores):
    """The same answers but for four questions about two images: paired, only those count."""
    other = scores[0].copy()
    other[[2, 3, 42, 43]] = 1 - other[[2, 3, 42, 43]]
    table = compare_answers([write(tmp_path / "a", "a", scores[0]), write(tmp_path / "b", "b", other)])
    row = table[table["protocol"] == "cvbench/3d"].iloc[0]
    rng = np.random.default_rng(1)
    changed = (other - scores[0]).reshape(-1, 2)[1::2]  # images of 3D, two questions each
    drawn = [changed[rng.integers(0, len(changed), len(changed))].mean() for _ in range(4000)]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    assert table[table["protocol"] == "cvbench/2d"][["value", "ci_low", "ci_high"]].to_numpy().ravel() == pytest.approx(
        0
    )


def test_folders_are_seeds_and_pairs_where_they_are_called_alike(tmp_path, scores):
    for arm, rows in (("base", scores[:2]), ("ola", scores[2:])):
        for seed, row in enumerate(rows):
            write(tmp_path / arm / f"seed_{seed}", "ift", row)
    table = compare_answers([tmp_path / "base", tmp_path / "ola"])
    row = table[table["protocol"] == "cvbench/3d"].iloc[0]
    means = [accuracy(one)["cvbench/3d"] for one in scores]
    assert (row["checkpoint"], row["reference"], row["seeds"]) == ("ola", "base", "2, 2")
    assert row["value"] == pytest.approx(np.mean(means[2:]) - np.mean(means[:2]))
    assert row["higher"] == f"{int(means[2] > means[0]) + int(means[3] > means[1])} of 2"


def test_other_questions_or_another_way_of_asking_are_refused(tmp_path, scores):
    first = write(tmp_path / "a", "a", scores[0])
    with pytest.raises(UserError, match="not asked the same questions"):
        compare_answers([first, write(tmp_path / "b", "b", scores[1], digest="other")])
    with pytest.raises(UserError, match=r"differ in suffix \('auto' and 'short'\)"):
        compare_answers([first, write(tmp_path / "c", "c", scores[1], suffix="short")])
    with pytest.raises(UserError, match="at least two runs of the same one"):
        compare_answers([first])
    (first / "answers.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"answers\.jsonl"):
        compare_answers([first, tmp_path / "c"])


def test_the_command_says_it_and_the_page_shows_it(tmp_path, scores):
    worse, better = np.zeros(80, dtype=int), np.ones(80, dtype=int)
    runs = [write(tmp_path / name, name, row) for name, row in (("a", worse), ("b", better), ("c", scores[0]))]
    said = CliRunner().invoke(cli, ["compare", *map(str, runs), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert said.exit_code == 0
    assert "CV-Bench, accuracy: b - a = +1.0000 [+1.0000, +1.0000] over 80 questions: b answers better" in said.output
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "paired differences</caption>" in page and "b − a" in page and "+1.000 [+1.000, +1.000]" in page
    table = pd.read_csv(tmp_path / "out" / "differences.csv", keep_default_na=False)
    assert set(table["metric"]) == {"accuracy"} and len(table) == 3 * 9


def test_half_of_a_benchmark_is_said_as_such(tmp_path, scores):
    halves = [write(tmp_path / name, name, row) for name, row in zip("ab", scores[:2], strict=True)]
    for run in halves:
        lines = [line for line in (run / "answers.jsonl").read_text().splitlines() if '"3d"' in line]
        (run / "answers.jsonl").write_text("\n".join(lines) + "\n")
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["data"]["questions"] = len(lines)
        (run / "manifest.json").write_text(json.dumps(manifest))
    sentences = answer_statements(compare_answers(halves))
    assert len(sentences) == 1 and sentences[0].startswith("CV-Bench 3d, accuracy: b - a = ")
