"""`probing bench` on tiny models: every published format, numbers against plain loops, resumption, bad input."""

import base64
import io
import json
import os
import shutil
import signal
import sys

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image
from pyarrow import parquet

from analysis.benchmarks import accuracy
from analysis.benchmarks import run as bench_module
from analysis.benchmarks.tasks import read_questions
from probing.cli import cli
from probing.toyworld.cvbench import write_cvbench
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import COLOURS, generate
from probing.utils.errors import UserError
from tests.helpers import tiny


def png(seed):
    buffer = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def cvbench_rows(count=12):
    """Rows with CV-Bench's columns: three sources, four tasks, two questions about each image."""
    places = [
        ("2D", "Count", "ADE20K"),
        ("2D", "Relation", "COCO"),
        ("3D", "Depth", "Omni3D"),
        ("3D", "Distance", "Omni3D"),
    ]
    rows = []
    for number in range(count):
        kind, task, source = places[number % 4]
        rows.append({
            "idx": number, "type": kind, "task": task, "image": {"bytes": png(number // 2), "path": None},
            "question": "Which?", "choices": ["chair", "table"], "answer": "(B)" if number % 3 else "(A)",
            "prompt": "Which? Select from the following choices.\n(A) chair\n(B) table",
            "filename": f"{kind}/{number // 2}.png", "source": source,
        })  # fmt: skip
    return rows


def mmstar_rows():
    return [
        {"index": n, "question": "Which?\nOptions: A: x, B: y, C: z, D: w", "image": {"bytes": png(n), "path": "x.png"},
         "answer": "ABCD"[n % 4], "category": ("math", "coarse perception")[n % 2], "l2_category": "geometry",
         "meta_info": {"source": "s", "split": "val", "image_path": "x.png"}}
        for n in range(6)
    ]  # fmt: skip


def realworldqa_rows():
    closed = "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option."
    return [
        {"image": {"bytes": png(n), "path": f"{n}.webp"}, "question": closed if n % 2 else "How many?",
         "answer": "B" if n % 2 else "Two", "image_path": f"{n}.webp"}
        for n in range(4)
    ]  # fmt: skip


def okvqa_rows():
    return [
        {"question_id": str(n), "image": {"bytes": png(n), "path": None}, "question": "What?",
         "answers": ["dog"] * 7 + ["cat"] * 3, "question_type": "one", "answer_type": "other"}
        for n in range(3)
    ]  # fmt: skip


def as_parquet(folder, rows, files=1, group=2):
    """As `datasets` writes it: images as structs, in several files and row groups."""
    (folder / "data").mkdir(parents=True)
    size = -(-len(rows) // files)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number * size : (number + 1) * size])
        parquet.write_table(table, folder / "data" / f"test-0000{number}-of-0000{files}.parquet", row_group_size=group)
    return folder


def as_jsonl(folder, rows):
    """As CV-Bench's own: two files, and images below img/."""
    folder.mkdir(parents=True)
    for row in rows:
        path = folder / "img" / row["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    for kind in ("2D", "3D"):
        lines = [json.dumps({k: v for k, v in r.items() if k != "image"}) for r in rows if r["type"] == kind]
        (folder / f"test_{kind.lower()}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def as_tsv(folder, rows):
    """As VLMEvalKit's: images in base64, one that comes again by the index of its first row, choices in columns."""
    folder.mkdir(parents=True)
    found, first = [], {}
    for number, row in enumerate(rows):
        content = base64.b64encode(row["image"]["bytes"]).decode()
        plain = {k: v for k, v in row.items() if isinstance(v, str | int)} | {"index": number}
        if "choices" in row:
            plain |= {letter: text for letter, text in zip("AB", row["choices"], strict=True)}
            plain["answer"] = row["answer"].strip("()")
        found.append(plain | {"image": str(first[content]) if content in first else content})
        first.setdefault(content, number)
    pd.DataFrame(found).to_csv(folder / "bench.tsv", sep="\t", index=False)
    return folder


def as_official_okvqa(folder, rows):
    (folder / "val2014").mkdir(parents=True)
    questions, annotations = [], []
    for number, row in enumerate(rows):
        image = 40 + number
        (folder / "val2014" / f"COCO_val2014_{image:012d}.jpg").write_bytes(row["image"]["bytes"])
        questions.append({"image_id": image, "question": row["question"], "question_id": number})
        answers = [{"answer": a, "raw_answer": a, "answer_confidence": "yes", "answer_id": k + 1}
                   for k, a in enumerate(row["answers"])]  # fmt: skip
        annotations.append({"image_id": image, "question_id": number, "answers": answers, "question_type": "one"})
    for name, key, entries in (("OpenEnded_mscoco_val2014_questions", "questions", questions),
                               ("mscoco_val2014_annotations", "annotations", annotations)):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps({"info": {}, "license": {}, key: entries}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.llava(tmp_path_factory.mktemp("bench") / "llava", seed=3)


def run_bench(checkpoint, name, data, out, *more):
    arguments = ["bench", checkpoint, "--benchmark", name, "--data", data, "--out", out, "max_new_tokens=3", *more]
    said = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
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
def test_every_published_format_is_asked_and_scored(checkpoint, tmp_path, name, write, rows):
    rows = rows()
    data = write(tmp_path / "data", rows)
    said, lines, results = run_bench(checkpoint, name, data, tmp_path / "run", "micro_batch=5")
    assert said.exit_code == 0 and "probing report" in said.output
    assert len(lines) == len(rows) and {line["image"] for line in lines} == {
        bench_module.hashlib.sha256(row["image"]["bytes"]).hexdigest()[:16] for row in rows
    }
    whole = results[results["variant"] == ""].set_index("metric")
    assert whole.loc["accuracy", "n"] == len(rows)
    assert whole.loc["unreadable", "value"] <= 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["unreadable"] == sum(line["read"] is None for line in lines)


def test_formats_say_the_same(tmp_path):
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


def answered(rows, scores):
    return [
        accuracy.Answered(
            str(row["idx"]), {k: row[k].lower() for k in ("type", "task", "source")}, row["filename"], "", "A", ["A"],
            score, 0.5,
        )
        for row, score in zip(rows, scores, strict=True)
    ]  # fmt: skip


def test_cvbench_accuracies_are_those_of_its_card():
    """2D is the mean of its sources, the whole the mean of 2D and 3D: by pandas, as the card has it."""
    rows = cvbench_rows(40)[:37]
    frame = pd.DataFrame(rows)
    frame["source"] = np.where((frame["type"] == "2D") & (frame.index < 13), "ADE20K", frame["source"])  # uneven
    rows = frame.to_dict("records")
    frame["score"] = np.random.default_rng(0).integers(0, 2, len(rows)).astype(float)
    found = {s.curve.variant: s for s in accuracy.summarise("cvbench", answered(rows, frame["score"]))
             if s.curve.metric == "accuracy"}  # fmt: skip
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
    found = {s.curve.variant for s in accuracy.summarise("cvbench", answered(rows, [1.0] * len(rows)))}
    assert found == {"3d", "3d/depth", "3d/distance"}


def test_questions_about_one_image_are_resampled_together():
    """The same answers about half as many images say less."""
    rows = cvbench_rows(80)
    rows = [row | {"type": "3D", "task": "Depth", "source": "Omni3D"} for row in rows]
    scores = [float(n // 4 % 2) for n in range(80)]
    widths = []
    for share in (1, 4):
        shared = [row | {"filename": str(n // share)} for n, row in enumerate(rows)]
        found = next(iter(accuracy.summarise("cvbench", answered(shared, scores)))).interval
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.2)  # groups of four with equal answers: root of four


def test_an_interrupted_run_goes_on_to_the_same_answers(checkpoint, tmp_path, monkeypatch):
    data, asked, real = as_parquet(tmp_path / "data", cvbench_rows(11)), [], bench_module.ask
    run_bench(checkpoint, "cvbench", data, tmp_path / "whole", "micro_batch=2")

    def stopped(backbone, recipe, images, questions, most):
        asked.extend(questions)
        if len(asked) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(backbone, recipe, images, questions, most)

    monkeypatch.setattr(bench_module, "ask", stopped)
    out = tmp_path / "run"
    arguments = ["bench", checkpoint, "--benchmark", "cvbench", "--data", data, "--out", out, "max_new_tokens=3"]
    said = CliRunner().invoke(cli, [*map(str, arguments), "micro_batch=2"], standalone_mode=False)
    assert isinstance(said.exception, click.Abort)  # `main` makes 130 and the command to resume of it
    assert not (out / "results.csv").exists()
    with (out / "state" / "answers.jsonl").open("a") as file:  # as a process leaves it that is killed while it writes
        file.write('["0123", "left"]\n["01')
    run_bench(checkpoint, "cvbench", data, out, "micro_batch=2")
    assert len(asked) == 4 + 7  # what was kept was not asked again; half a batch is no batch
    for file in ("answers.jsonl", "results.csv"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    run_bench(checkpoint, "cvbench", data, out, "micro_batch=2")  # finished: nothing is asked
    assert len(asked) == 11


def test_answers_of_other_questions_are_not_taken_over(checkpoint, tmp_path):
    data = as_parquet(tmp_path / "data", cvbench_rows(4))
    run_bench(checkpoint, "cvbench", data, tmp_path / "run")
    shutil.rmtree(data)
    as_parquet(data, cvbench_rows(8))
    with pytest.raises(UserError, match="the questions changed since"):
        run_bench(checkpoint, "cvbench", data, tmp_path / "run")
    with pytest.raises(UserError, match="another recipe"):
        run_bench(checkpoint, "cvbench", data, tmp_path / "run", "micro_batch=3")


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
        ("okvqa", lambda data: None, "no column answers"),
        ("cvbench", lambda data: shutil.rmtree(data / "img"), "12 of the 12 images of CV-Bench are missing"),
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
def test_bad_input_is_one_line(checkpoint, tmp_path, name, spoil, said):
    data = as_jsonl(tmp_path / "data", cvbench_rows())
    spoil(data)
    with pytest.raises(UserError, match=said) as raised:
        run_bench(checkpoint, name, data, tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_without_pyarrow_parquet_is_asked_for(tmp_path, monkeypatch):
    data = as_parquet(tmp_path / "data", cvbench_rows(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'mllm-probing\[bench\]'"):
        read_questions("cvbench", data)


def test_okvqa_without_its_annotations_or_images(checkpoint, tmp_path):
    data = as_official_okvqa(tmp_path / "data", okvqa_rows())
    annotations = data / "mscoco_val2014_annotations.json"
    whole = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({"annotations": whole["annotations"][:1]}))
    with pytest.raises(UserError, match="question 1, has no annotation"):
        read_questions("okvqa", data)
    annotations.unlink()
    with pytest.raises(UserError, match="put it there"):
        read_questions("okvqa", data)
    annotations.write_text(json.dumps(whole))
    shutil.rmtree(data / "val2014")
    with pytest.raises(UserError, match="3 of the 3 images"):
        read_questions("okvqa", data)


def test_the_toy_worlds_questions_follow_from_its_scenes(tmp_path):
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
def test_the_toy_llava_counts_solids(tmp_path):
    """A trained checkpoint answers far above guessing, through the same command as CV-Bench."""
    data = write_cvbench(tmp_path / "cv", generate(60, 5), seed=0)
    _, _, results = run_bench(ASSETS / "llava", "cvbench", data, tmp_path / "run", "suffix=", "micro_batch=32")
    count = results[results["variant"] == "2d/count"].set_index("metric")
    assert count.loc["accuracy", "ci_low"] > 0.6 > count.loc["accuracy", "chance"] == 0.25
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
def test_questions_without_a_picture_are_left_out_and_named(checkpoint, tmp_path, spoil, reason):
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


def test_a_benchmark_without_any_picture_is_an_error(checkpoint, tmp_path):
    data = as_jsonl(tmp_path / "data", cvbench_rows(4))
    for file in (data / "img").rglob("*.png"):
        spoil_png(file)
    with pytest.raises(UserError, match="no image of CV-Bench can be read, first corrupt"):
        run_bench(checkpoint, "cvbench", data, tmp_path / "run")
