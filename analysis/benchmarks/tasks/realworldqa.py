"""RealWorldQA (xAI, 2024; `xai-org/RealworldQA`), parsed as by lmms-eval, since it has no script.

Exact match in lower case without a final full stop, after number words have become digits and the text of a choice its
letter. A letter in brackets, or before a full stop and text (`B. Left`), is accepted too.
"""

import re

from analysis.benchmarks.files import QuestionRow
from analysis.benchmarks.tasks.base import (
    LETTER_ALONE,
    LETTER_IN_BRACKETS,
    NUMBERS,
    ONLY_THE_LETTER,
    Benchmark,
    Question,
    choice_by_text,
    choice_columns,
    listed,
    plain,
    register,
)

OPTION = re.compile(r"^\s*([A-J])[.:]\s+(.*?)\s*$", re.MULTILINE)
"""A line `A. text` of a question."""


@register
class RealWorldQA(Benchmark):
    """Choices and short open answers."""

    name, title, split, size = "realworldqa", "RealWorldQA", "test", 765
    columns = ("question", "answer")

    def question(self, row: QuestionRow) -> Question:
        """Choices are in columns or in the question; an answer that is no choice makes it an open question."""
        text, columns = str(row.values["question"]).strip(), choice_columns(row)
        if columns:
            text += listed(columns, "\n{}. {}") + f"\n{ONLY_THE_LETTER}"
        choices = columns or dict(OPTION.findall(text))
        answer = str(row.values["answer"]).strip()
        if answer.upper().rstrip(".") not in choices:
            answer = next((name for name, choice in choices.items() if choice.lower() == answer.lower()), answer)
            choices = choices if answer in choices else {}
        return Question(row.name("index"), text, (answer.rstrip("."),), choices, {}, row.image)

    def parse(self, question: Question, answer: str) -> str | None:
        """The letter, or the normalised text of an open answer."""
        if not question.choices:
            return NUMBERS.get(plain(answer), plain(answer)) or None
        choice = choice_by_text(question, answer)
        match = LETTER_IN_BRACKETS.match(answer.strip()) or LETTER_ALONE.match(answer.strip())
        if choice or match is None:
            return choice
        return match[1].upper() if match[1].upper() in question.choices else None

    def score(self, question: Question, parsed: str) -> float:
        """Exact match."""
        if question.choices:
            return super().score(question, parsed)
        correct = plain(question.answers[0])
        return float(parsed == NUMBERS.get(correct, correct))
