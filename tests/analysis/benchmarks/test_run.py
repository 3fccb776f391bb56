"""`probing bench` on tiny models: every published format, resumption, bad input."""

import hashlib
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pandas as pd
import pytest

from analysis.benchmarks import run as bench_module
from analysis.benchmarks import tasks
from analysis.benchmarks.questions import read_questions
from probing.toyworld.cvbench import write_cvbench
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import COLOURS, generate
from probing.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.benchmark_files import (
    as_jsonl,
    as_official_okvqa,
    as_parquet,
    as_tsv,
    cvbench_rows,
    mmstar_rows,
    okvqa_rows,
    png,
    realworldqa_rows,
)
from tests.helpers.cli import error_line, probing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.llava(tmp_path_factory.mktemp("bench") / "llava", seed=3)


def command(checkpoint, name, data, out, *more):
    return ["bench", checkpoint, "--benchmark", name, "--data", data, "--out", out, "max_new_tokens=3", *more]


def refused(*arguments):
    return error_line(*command(*arguments))


def run_bench(*arguments):
    out = arguments[3]
    said = probing(*command(*arguments))
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    return said, lines, pd.read_csv(out / "results.csv", keep_default_na=False)


@pytest.mark.parametrize(
    ("name", "write", "rows"),
    [
        ("cvbench", as_parquet, cvbench_rows),
        ("cvbench", as_jsonl, cvbench_rows),
        ("cvbench", as_tsv, cvbench_rows),
        ("mmstar", as_parquet, mmstar_rows),
        ("mmstar", as_tsv, mmstar_rows),
        ("realworldqa", as_parquet, realworldqa_rows),
        ("realworldqa", as_tsv, realworldqa_rows),
        ("okvqa", as_parquet, okvqa_rows),
        ("okvqa", as_official_okvqa, okvqa_rows),
    ],
)
def test_published_formats_are_answered_and_scored(checkpoint, tmp_path, name, write, rows):
    rows = rows()
    data = write(tmp_path / "data", rows)
    said, lines, results = run_bench(checkpoint, name, data, tmp_path / "run", "micro_batch=5")
    assert said.exit_code == 0 and "probing report" in said.output
    assert len(lines) == len(rows) and {line["image"] for line in lines} == {
        hashlib.sha256(row["image"]["bytes"]).hexdigest()[:16] for row in rows
    }
    whole = results[results["variant"] == ""].set_index("metric")
    assert whole.loc["accuracy", "n"] == len(rows)
    assert whole.loc["unreadable", "value"] <= 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["unreadable"] == sum(line["parsed"] is None for line in lines)


def test_formats_give_the_same_questions(tmp_path):
    """The same questions, whichever form they were published in; images too."""
    rows = cvbench_rows()
    found = [
        read_questions("cvbench", write(tmp_path / write.__name__, rows)) for write in (as_parquet, as_jsonl, as_tsv)
    ]
    parts = as_parquet(tmp_path / "parts", rows, files=3, group=3)
    found.append(read_questions("cvbench", parts))
    by_name = [{q.name: q for q in questions} for questions in found]
    for other in by_name[1:]:
        for name, question in by_name[0].items():
            assert (question.text, question.answers, question.groups) == (
                other[name].text, other[name].answers, other[name].groups
            )  # fmt: skip
            assert question.image() == other[name].image() == rows[int(name)]["image"]["bytes"]
    assert [q.name for q in found[0]] == [str(row["idx"]) for row in rows]


def test_interrupted_run_resumes_to_the_same_answers(checkpoint, tmp_path, monkeypatch):
    data, posed, real = as_parquet(tmp_path / "data", cvbench_rows(11)), [], bench_module.ask
    run_bench(checkpoint, "cvbench", data, tmp_path / "whole", "micro_batch=2")

    def stopped(backbone, recipe, images, questions, most):
        posed.extend(questions)
        if len(posed) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(backbone, recipe, images, questions, most)

    monkeypatch.setattr(bench_module, "ask", stopped)
    out = tmp_path / "run"
    arguments = ["bench", checkpoint, "--benchmark", "cvbench", "--data", data, "--out", out, "max_new_tokens=3"]
    assert "resume with: probing bench" in probing(*arguments, "micro_batch=2", code=130).stderr
    assert not (out / "results.csv").exists()
    with (out / "state" / "answers.jsonl").open("a") as file:  # as a process leaves it that is killed while it writes
        file.write('["0123", "left"]\n["01')
    run_bench(checkpoint, "cvbench", data, out, "micro_batch=2")
    assert len(posed) == 4 + 7  # saved answers were not generated again; half a batch is no batch
    for file in ("answers.jsonl", "results.csv"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    run_bench(checkpoint, "cvbench", data, out, "micro_batch=2")  # finished: nothing is generated
    assert len(posed) == 11


def test_changed_questions_are_refused(checkpoint, tmp_path):
    data = as_parquet(tmp_path / "data", cvbench_rows(4))
    run_bench(checkpoint, "cvbench", data, tmp_path / "run")
    shutil.rmtree(data)
    as_parquet(data, cvbench_rows(8))
    assert "the questions changed since" in refused(checkpoint, "cvbench", data, tmp_path / "run")
    assert "holds another run" in refused(checkpoint, "cvbench", data, tmp_path / "run", "micro_batch=3")


def bad_answer(data):
    file = data / "test_2d.jsonl"
    file.write_text(file.read_text().replace('"answer": "(A)"', '"answer": "maybe"'))


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("cvbench", lambda data: shutil.rmtree(data), "no such folder"),
        ("cvbench", lambda data: [file.unlink() for file in data.glob("*.jsonl")], "has no files of CV-Bench"),
        ("mmstar", lambda data: None, "it looks like CV-Bench: --benchmark cvbench"),
        ("realworldqa", lambda data: None, "it looks like CV-Bench"),
        ("okvqa", lambda data: None, "lacks columns of OK-VQA; it looks like CV-Bench"),
        ("cvbench", lambda data: shutil.rmtree(data / "img"), "all 12 images of CV-Bench are missing"),
        ("cvbench", bad_answer, "row 0, is no question of CV-Bench .*'maybe' is no letter"),
        ("cvbench", lambda data: (data / "test_3d.jsonl").write_text(""), "test_3d.jsonl holds no question"),
        ("cvbench", lambda data: (data / "test_2d.jsonl").write_text('{"idx"'), "test_2d.jsonl cannot be read"),
        ("cvbench", lambda data: (data / "test_2d.jsonl").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (
            "cvbench",
            lambda data: (data / "test.parquet").write_bytes(b"PAR1 and nothing"),
            "test.parquet cannot be read",
        ),
        ("cvbench", lambda data: shutil.copy(data / "test_2d.jsonl", data / "again.jsonl"), "a second time"),
        ("cvbench", lambda data: (data / "x.jsonl").write_text('{"filename": "../../etc/passwd"}\n'), "plain path"),
        ("okvqa", lambda data: (data / "OpenEnded_mscoco_val2014_questions.json").write_text("[]"), "annotations"),
    ],
)
def test_bad_input_is_a_user_error(checkpoint, tmp_path, name, spoil, said):
    data = as_jsonl(tmp_path / "data", cvbench_rows())
    spoil(data)
    assert re.search(said, refused(checkpoint, name, data, tmp_path / "run"))


def test_parquet_without_pyarrow_is_a_user_error(tmp_path, monkeypatch):
    data = as_parquet(tmp_path / "data", cvbench_rows(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'mllm-probing\[bench\]'"):
        read_questions("cvbench", data)


def test_okvqa_without_annotations_or_images_is_refused(checkpoint, tmp_path):
    data = as_official_okvqa(tmp_path / "data", okvqa_rows())
    annotations = data / "mscoco_val2014_annotations.json"
    whole = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({"annotations": whole["annotations"][:1]}))
    with pytest.raises(UserError, match="do not fit"):
        read_questions("okvqa", data)
    annotations.unlink()
    with pytest.raises(UserError, match=r"annotations\.json is missing"):
        read_questions("okvqa", data)
    annotations.write_text(json.dumps(whole))
    shutil.rmtree(data / "val2014")
    with pytest.raises(UserError, match="all 3 images"):
        read_questions("okvqa", data)


def test_toy_questions_follow_from_scenes(tmp_path):
    """Answers against the scenes' own numbers, counted in another way: pixels and depth maps."""
    scenes = generate(40, 5)
    data = write_cvbench(tmp_path / "cv", scenes, seed=0)
    rows = [json.loads(line) for file in sorted(data.glob("*.jsonl")) for line in file.read_text().splitlines()]
    assert {(row["type"], row["task"]) for row in rows} == {
        ("2D", "Count"), ("2D", "Relation"), ("3D", "Depth"), ("3D", "Distance")
    }  # fmt: skip
    for row in rows:
        index = int(row["filename"].split(".")[0])
        right = row["choices"][["(A)", "(B)", "(C)", "(D)"].index(row["answer"])]
        solids = range(int(scenes.count[index]))
        slot = {COLOURS[scenes.colour[index, k]]: k for k in solids}
        named = [slot[word] for word in row["question"].split() if word in slot]
        masks = [scenes.instance[index] == k + 1 for k in named]
        if row["task"] == "Count":
            assert ("one", "two", "three", "four").index(right) + 1 == len(set(scenes.instance[index].flat) - {0})
        elif row["task"] == "Relation":
            middle = [np.nonzero(mask)[1].mean() for mask in masks]
            if abs(middle[0] - middle[1]) > 6:  # hidden parts move the middle of what is seen
                assert right == ("left" if middle[0] < middle[1] else "right")
        elif row["task"] == "Depth":
            near = [scenes.depth[index][mask].min() for mask in masks]
            if abs(near[0] - near[1]) > 1:  # the nearest point is not the centre
                assert slot[right] == named[int(near[1] < near[0])]
        else:
            assert slot[right] in named[1:]
    assert len({row["answer"] for row in rows if row["task"] == "Depth"}) == 2


@pytest.mark.slow
def test_toy_llava_counts_solids(tmp_path):
    """A trained checkpoint answers far above guessing, through the same command as CV-Bench."""
    data = write_cvbench(tmp_path / "cv", generate(60, 5), seed=0)
    _, _, results = run_bench(ASSETS / "llava", "cvbench", data, tmp_path / "run", "suffix=", "micro_batch=32")
    count = results[results["variant"] == "2d/count"].set_index("metric")
    assert count.loc["accuracy", "ci_low"] > 0.6 > float(count.loc["accuracy", "chance"]) == 0.25
    assert count.loc["unreadable", "value"] == 0


def spoil_png(file):
    file.write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.unlink(), "missing"),
        (spoil_png, "corrupt: it is no image"),
        (lambda file: file.write_bytes(b""), "corrupt"),
        (lambda file: file.write_bytes(file.read_bytes()[:-300]), "corrupt"),
    ],
    ids=["missing", "text", "empty", "cut off"],
)
def test_questions_without_image_are_skipped_and_named(checkpoint, tmp_path, spoil, reason):
    rows = cvbench_rows()
    data = as_jsonl(tmp_path / "data", rows)
    whole = run_bench(checkpoint, "cvbench", data, tmp_path / "whole", "micro_batch=2")[1]
    bad = data / "img" / "3D" / "1.png"
    spoil(bad)
    lost = {str(row["idx"]) for row in rows if row["filename"] == "3D/1.png"}
    said, lines, results = run_bench(checkpoint, "cvbench", data, tmp_path / "run", "micro_batch=2")
    assert said.exit_code == 0
    assert lines == [line for line in whole if line["question"] not in lost]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {skip["image"] for skip in manifest["skipped"]} == lost and manifest["data"]["questions"] == len(lines)
    assert all(skip["reason"].startswith(reason) for skip in manifest["skipped"])
    chosen = results[(results["metric"] == "accuracy") & (results["variant"] == "")]
    assert set(chosen["n"]) == {len(rows) - len(lost)}


def test_benchmark_without_images_is_a_user_error(checkpoint, tmp_path):
    data = as_jsonl(tmp_path / "data", cvbench_rows(4))
    for file in (data / "img").rglob("*.png"):
        spoil_png(file)
    line = refused(checkpoint, "cvbench", data, tmp_path / "run")
    assert "no image of CV-Bench can be read, first corrupt" in line


NEW_TASK = """
from analysis.benchmarks.tasks.base import Benchmark, Question, register

@register
class ColourQA(Benchmark):
    name, title, split, size, columns = "colourqa", "ColourQA", "test", 2, ("colour",)

    def question(self, row):
        return Question(row.name("idx"), "Which colour?", (row.values["colour"],), {}, {}, row.image)

    def parse(self, question, answer):
        return answer.strip() or None
"""


def test_new_benchmark_is_one_file(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colourqa.py").write_text(NEW_TASK)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "tasks")])
    tasks.discover()
    try:
        rows = [{"idx": n, "colour": "red", "image": {"bytes": png(n), "path": None}} for n in range(2)]
        data = as_parquet(tmp_path / "data", rows)
        said, lines, _ = run_bench(checkpoint, "colourqa", data, tmp_path / "run")
        assert said.exit_code == 0 and [line["correct"] for line in lines] == [["red"], ["red"]]
        assert tasks.title("colourqa", {2}) == "ColourQA"
    finally:
        del tasks.BENCHMARKS["colourqa"]


def test_unknown_benchmark_is_a_user_error(checkpoint, tmp_path):
    assert "is not one of cvbench" in refused(checkpoint, "vqa", tmp_path, tmp_path / "run")
