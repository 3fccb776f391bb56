"""Accuracies of a benchmark's parts and their intervals."""

import numpy as np
import pandas as pd
import pytest

from analysis.benchmarks.accuracy import ScoredAnswer, summarise
from tests.helpers.benchmark_files import cvbench_rows


def answers(rows, scores):
    return [
        ScoredAnswer(
            str(row["idx"]), {k: row[k].lower() for k in ("type", "task", "source")}, row["filename"], "", "A", ["A"],
            score, 0.5,
        )
        for row, score in zip(rows, scores, strict=True)
    ]  # fmt: skip


def test_cvbench_accuracies_follow_its_card():
    """2D is the mean of its sources, the whole the mean of 2D and 3D: by pandas, as the card has it."""
    rows = cvbench_rows(40)[:37]
    frame = pd.DataFrame(rows)
    frame["source"] = np.where((frame["type"] == "2D") & (frame.index < 13), "ADE20K", frame["source"])  # uneven
    rows = frame.to_dict("records")
    frame["score"] = np.random.default_rng(0).integers(0, 2, len(rows)).astype(float)
    found = {s.key.variant: s for s in summarise("cvbench", answers(rows, frame["score"]))
             if s.key.metric == "accuracy"}  # fmt: skip
    of = frame.groupby("source")["score"].mean()
    flat = (of["ADE20K"] + of["COCO"]) / 2
    expected = {"": (flat + of["Omni3D"]) / 2, "2d": flat, "3d": of["Omni3D"]}
    expected |= {f"2d/{s.lower()}": of[s] for s in ("ADE20K", "COCO")}
    for (kind, task), part in frame.groupby(["type", "task"]):
        expected[f"{kind.lower()}/{task.lower()}"] = part["score"].mean()
    assert {name: s.interval.value for name, s in found.items()} == pytest.approx(expected)
    assert next(iter(found)) == "" and found[""].n == 37
    assert all(s.interval.low <= s.interval.value <= s.interval.high for s in found.values())


def test_half_of_cvbench_has_no_overall_accuracy():
    rows = [row for row in cvbench_rows() if row["type"] == "3D"]
    found = {s.key.variant for s in summarise("cvbench", answers(rows, [1.0] * len(rows)))}
    assert found == {"3d", "3d/depth", "3d/distance"}


def test_questions_about_one_image_are_resampled_together():
    """The same answers about half as many images say less."""
    rows = cvbench_rows(80)
    rows = [row | {"type": "3D", "task": "Depth", "source": "Omni3D"} for row in rows]
    scores = [float(n // 4 % 2) for n in range(80)]
    widths = []
    for share in (1, 4):
        shared = [row | {"filename": str(n // share)} for n, row in enumerate(rows)]
        found = next(iter(summarise("cvbench", answers(shared, scores)))).interval
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.2)  # groups of four with equal answers: root of four
