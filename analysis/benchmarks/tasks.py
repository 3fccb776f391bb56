"""Benchmarks of answers, as their files are published: questions, right answers, and where the image is.

CV-Bench (`nyu-visionx/CV-Bench`: parquet, or JSONL beside `img/`), MMStar (`Lin-Chen/MMStar`), RealWorldQA
(`xai-org/RealworldQA`), each also as a TSV of VLMEvalKit with images in base64; and OK-VQA, as its official questions
and annotations beside COCO's images of 2014, or as parquet (`lmms-lab/OK-VQA`). The columns are those of the data sets'
cards; the TSVs' are those of VLMEvalKit's documentation.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.benchmarks.files import Row, find_rows, okvqa_rows
from probing.utils.errors import UserError

LETTERS = "ABCDEFGHIJ"
OPTION = re.compile(r"^\s*([A-J])[.:]\s+(.*?)\s*$", re.MULTILINE)
"""A line `A. text` of a question."""


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        name: unique in its benchmark.
        text: what the checkpoint is asked.
        answers: the right one; of OK-VQA what people answered.
        choices: text by letter; empty where the question is open. The text is empty where only the letters are known.
        groups: what it belongs to, by kind: `type`, `task` and `source` in CV-Bench, `category` in MMStar.
        image: reads the image file.
    """

    name: str
    text: str
    answers: tuple[str, ...]
    choices: dict[str, str]
    groups: dict[str, str]
    image: Callable[[], bytes] = field(compare=False)


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark.

    Attributes:
        title: its name.
        split: which part of it is asked.
        columns: that its files have.
        suffix: what follows every question.
        question: makes a question of a row; raises as reading broken files does.
        size: number of questions, as published.
    """

    title: str
    split: str
    columns: tuple[str, ...]
    suffix: str
    question: Callable[[Row], Question]
    size: int


def _letter(text: Any) -> str:
    """`(B)` or `B` → `B`; raises ValueError where it is no letter of an option."""
    found = re.fullmatch(r"\(?([A-Ja-j])\)?\.?", str(text).strip())
    if found is None:
        raise ValueError(f"the answer {str(text)[:20]!r} is no letter")
    return found[1].upper()


def _columns_of_choices(row: Row) -> dict[str, str]:
    """Choices in columns `A`, `B`, … of their own, as VLMEvalKit has them; those that are there and not empty."""
    return {letter: str(row.values[letter]) for letter in LETTERS if str(row.values.get(letter) or "").strip()}


def _listed(choices: dict[str, str], form: str) -> str:
    return "".join(form.format(letter, text) for letter, text in choices.items())


def _cvbench(row: Row) -> Question:
    values = row.values
    choices = _columns_of_choices(row)
    if not choices:
        choices = dict(zip(LETTERS, map(str, values["choices"]), strict=False))
    text = values.get("prompt") or (
        f"{values['question']} Select from the following choices." + _listed(choices, "\n({}) {}")
    )
    answer = _letter(values["answer"])
    if answer not in choices:
        raise ValueError(f"the answer {answer} is none of {len(choices)} choices")
    groups = {name: str(values[name]).lower() for name in ("type", "task", "source")}
    return Question(row.name("idx", "index"), str(text), (answer,), choices, groups, row.image)


def _mmstar(row: Row) -> Question:
    choices = _columns_of_choices(row)
    text = str(row.values["question"]) + ("\nOptions:" if choices else "") + _listed(choices, "\n{}: {}")
    choices = choices or dict.fromkeys("ABCD", "")
    groups = {"category": str(row.values["category"]).lower()}
    return Question(row.name("index"), text, (_letter(row.values["answer"]),), choices, groups, row.image)


ONLY_THE_LETTER = "Please answer directly with only the letter of the correct option and nothing else."


def _realworldqa(row: Row) -> Question:
    text, columns = str(row.values["question"]).strip(), _columns_of_choices(row)
    if columns:
        text += _listed(columns, "\n{}. {}") + f"\n{ONLY_THE_LETTER}"
    choices = columns or dict(OPTION.findall(text))
    answer = str(row.values["answer"]).strip()
    if answer.upper().rstrip(".") not in choices:  # given as text: by its letter, or the question is open
        answer = next((letter for letter, said in choices.items() if said.lower() == answer.lower()), answer)
        choices = choices if answer in choices else {}
    return Question(row.name("index"), text, (answer.rstrip("."),), choices, {}, row.image)


def _okvqa(row: Row) -> Question:
    answers = row.values["answers"]
    if isinstance(answers, str) or not len(answers):
        raise ValueError("the answers are no list")
    people = tuple(str(one["answer"] if isinstance(one, dict) else one) for one in answers)
    return Question(row.name("question_id"), str(row.values["question"]), people, {}, {}, row.image)


BENCHMARKS = {
    "cvbench": Benchmark(
        "CV-Bench",
        "test",
        ("type", "task", "question", "answer", "source"),
        "\nAnswer with the letter of the right choice alone, as in (A).",
        _cvbench,
        2638,
    ),
    "mmstar": Benchmark(
        "MMStar", "val", ("question", "answer", "category", "l2_category"), f"\n{ONLY_THE_LETTER}", _mmstar, 1500
    ),
    "realworldqa": Benchmark("RealWorldQA", "test", ("question", "answer"), "", _realworldqa, 765),
    "okvqa": Benchmark(
        "OK-VQA",
        "val2014",
        ("question", "answers", "question_id"),
        "\nAnswer the question using a single word or phrase.",
        _okvqa,
        5046,
    ),
}


_NAMES = {"2d": "2D", "3d": "3D", "ade20k": "ADE20K", "coco": "COCO", "omni3d": "Omni3D"}
"""Parts of a benchmark whose names are not just capitalised."""


def title(name: str, questions: set[int]) -> str:
    """What a benchmark is called; by its own name alone where exactly its published questions were asked.

    Args:
        name: one of `BENCHMARKS`.
        questions: how many each checkpoint was asked.
    """
    known = BENCHMARKS[name]
    if questions == {known.size}:
        return known.title
    return f"{known.title}-like ({' or '.join(map(str, sorted(questions)))} questions)"


def part_label(part: str) -> str:
    """Returns the label of a part of a benchmark: `2d/count` → 2D, Count."""
    return ", ".join(_NAMES.get(name, name.capitalize()) for name in part.split("/") if name) or "Overall"


def read_questions(name: str, where: Path) -> list[Question]:
    """Reads a benchmark.

    Args:
        name: one of `BENCHMARKS`.
        where: folder of its files, or one of them.

    Returns:
        The questions, in the files' order.

    Raises:
        UserError: there are no such files, they are broken or of another benchmark, or all images are missing.
    """
    benchmark = BENCHMARKS[name]
    rows = (okvqa_rows(where) if name == "okvqa" else []) or find_rows(where, benchmark.title)
    _require_columns(name, rows)
    questions: dict[str, Question] = {}
    for row in rows:
        try:
            question = benchmark.question(row)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{row.file}, row {row.number}, is no question of {benchmark.title} ({type(error).__name__}: {error}); "
                "get the file again"
            ) from None
        if question.name in questions:
            raise UserError(
                f"{row.file} has the question {question.name} a second time; leave only one copy of {benchmark.title} "
                f"in {where}, or give one file"
            )
        questions[question.name] = question
    lacking = [path for row in rows if (path := row.missing_image()) is not None]
    if len(lacking) == len(rows):
        raise UserError(
            f"{len(lacking)} of the {len(rows)} images of {benchmark.title} are missing, first {lacking[0]}; put them "
            "there"
        )
    return list(questions.values())


def _require_columns(name: str, rows: Sequence[Row]) -> None:
    for row in {row.file: row for row in rows}.values():
        lacking = [column for column in BENCHMARKS[name].columns if column not in row.values]
        if name == "realworldqa" and not lacking and _looks_like(row) not in (None, name):
            lacking = ["(all of them are another benchmark's)"]
        if lacking:
            other = _looks_like(row)
            hint = f"it looks like {BENCHMARKS[other].title}: --benchmark {other}" if other else "give its own files"
            raise UserError(f"{row.file} is no file of {BENCHMARKS[name].title}: no column {lacking[0]}; {hint}")


def _looks_like(row: Row) -> str | None:
    """The first benchmark whose columns a row has all; RealWorldQA, whose columns most have, comes last."""
    order = sorted(BENCHMARKS, key=lambda name: -len(BENCHMARKS[name].columns))
    return next((name for name in order if all(c in row.values for c in BENCHMARKS[name].columns)), None)


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 over names, texts and answers: identifies what was asked."""
    found = hashlib.sha256()
    for question in questions:
        found.update(repr((question.name, question.text, question.answers)).encode())
    return found.hexdigest()
