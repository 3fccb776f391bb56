"""Reads the questions of a benchmark from the files that a user downloaded."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from analysis.benchmarks.files import QuestionRow
from analysis.benchmarks.tasks import BENCHMARKS, Question
from probing.utils.errors import UserError
from probing.utils.paths import is_file


def read_questions(name: str, source: Path) -> list[Question]:
    """Reads a benchmark, in the order of its files.

    Args:
        name: a key of `BENCHMARKS`.
        source: folder of its files, or one of them.

    Raises:
        UserError: there are no such files, they are broken or of another benchmark, or all images are missing.
    """
    benchmark = BENCHMARKS[name]
    rows = benchmark.rows(source)
    for row in {row.file: row for row in rows}.values():
        _require_benchmark(name, row)
    questions: dict[str, Question] = {}
    for row in rows:
        try:
            question = benchmark.question(row)
        except (KeyError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{row.file}, row {row.number}, is no question of {benchmark.title} ({reason}); get the file again"
            ) from None
        if question.name in questions:
            raise UserError(f"{row.file} has question {question.name} a second time; keep one copy, or give one file")
        questions[question.name] = question
    missing = [row.path for row in rows if row.path is not None and not is_file(row.path)]
    if len(missing) == len(rows):
        raise UserError(f"all {len(rows)} images of {benchmark.title} are missing, first {missing[0]}; put them there")
    return list(questions.values())


def _require_benchmark(name: str, row: QuestionRow) -> None:
    """Raises UserError where a file has the columns of another benchmark, of which the most specific is suggested."""
    fits = [other for other, known in BENCHMARKS.items() if set(known.columns) <= row.values.keys()]
    best = max(fits, key=lambda other: len(BENCHMARKS[other].columns), default=None)
    if name not in fits or (best and set(BENCHMARKS[name].columns) < set(BENCHMARKS[best].columns)):
        hint = f"it looks like {BENCHMARKS[best].title}: --benchmark {best}" if best else "give its own files"
        raise UserError(f"{row.file} lacks columns of {BENCHMARKS[name].title}; {hint}")


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 over names, texts and answers: identifies the questions."""
    sha256 = hashlib.sha256()
    for question in questions:
        sha256.update(repr((question.name, question.text, question.answers)).encode())
    return sha256.hexdigest()
