"""What a benchmark defines: how a row becomes a question, and how an answer is parsed and scored."""

import abc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from analysis.benchmarks.files import QuestionRow, find_rows

LETTERS = "ABCDEFGHIJ"
LETTER_IN_BRACKETS = re.compile(r"\(([A-Ja-j])\)")
LETTER_ALONE = re.compile(r"([A-Ja-j])(?:[.):,]|$)")
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
ONLY_THE_LETTER = "Please answer directly with only the letter of the correct option and nothing else."


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        name: unique in its benchmark.
        text: the prompt.
        answers: the correct one; several people's for an open question.
        choices: text by letter; empty for an open question. Texts are empty where only the letters are known.
        groups: kind → group that it belongs to, e.g. `task` → `count`.
        image: reads the image file.
    """

    name: str
    text: str
    answers: tuple[str, ...]
    choices: dict[str, str]
    groups: dict[str, str]
    image: Callable[[], bytes] = field(compare=False)


class Part(NamedTuple):
    """A part of a benchmark.

    Attributes:
        name: empty for the whole, else e.g. `2d` or `2d/count`.
        strata: weights, and the groups of the questions that each weighs; the accuracy is the weighted mean.
    """

    name: str
    strata: list[tuple[float, dict[str, str]]]


class Benchmark(abc.ABC):
    """A task; subclasses set the attributes and define `question` and `parse`."""

    name: ClassVar[str]
    title: ClassVar[str]
    split: ClassVar[str]
    size: ClassVar[int]
    """Number of questions as published."""
    columns: ClassVar[tuple[str, ...]]
    """Columns that its files have."""
    suffix: ClassVar[str] = ""
    """Text after every question."""
    part_labels: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Groups and their labels, where these are not just capitalised."""

    def rows(self, source: Path) -> list[QuestionRow]:
        """Reads the rows of its published files."""
        return find_rows(source, self.title)

    @abc.abstractmethod
    def question(self, row: QuestionRow) -> Question:
        """Makes a question of a row; raises KeyError, ValueError or TypeError where it is none."""

    @abc.abstractmethod
    def parse(self, question: Question, answer: str) -> str | None:
        """The letter or text that an answer means; None where it is unreadable."""

    def score(self, question: Question, parsed: str) -> float:
        """The score of a parsed answer, 0 to 1."""
        return float(parsed.upper() == question.answers[0].strip().upper())

    def parts(self, groups: Sequence[dict[str, str]]) -> list[Part]:
        """The parts that have an accuracy, the whole first, from the groups of each question."""
        categories = dict.fromkeys(group["category"] for group in groups if group.get("category"))
        return [Part("", [(1.0, {})]), *(Part(name, [(1.0, {"category": name})]) for name in categories)]


BENCHMARKS: dict[str, Benchmark] = {}


def register(benchmark: type[Benchmark]) -> type[Benchmark]:
    """Adds a benchmark to `BENCHMARKS`."""
    BENCHMARKS[benchmark.name] = benchmark()
    return benchmark


def letter(text: Any) -> str:
    """`(B)` or `b.` → `B`; raises ValueError where the text is no letter."""
    match = re.fullmatch(r"\(?([A-Ja-j])\)?\.?", str(text).strip())
    if match is None:
        raise ValueError(f"the answer {str(text)[:20]!r} is no letter")
    return match[1].upper()


def choice_columns(row: QuestionRow) -> dict[str, str]:
    """Choices in columns `A`, `B`, …, as in VLMEvalKit's files; empty ones are left out."""
    return {name: str(row.values[name]) for name in LETTERS if str(row.values.get(name) or "").strip()}


def listed(choices: dict[str, str], form: str) -> str:
    """Formats all choices, each with its letter and text."""
    return "".join(form.format(*choice) for choice in choices.items())


def plain(text: str) -> str:
    """Lower case on one line, without a final full stop."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def choice_by_text(question: Question, answer: str) -> str | None:
    """The letter of the only choice whose text is the whole answer."""
    same = [name for name, text in question.choices.items() if text and plain(text) == plain(answer)]
    return same[0] if len(same) == 1 else None
