"""MMStar (Chen et al., 2024, arXiv:2403.20330; `Lin-Chen/MMStar`), parsed as by its evaluation script.

In lower case, the letter is the first character, or follows `(`, `option ` or `the answer is `, each only at the very
beginning.
"""

from analysis.benchmarks.files import QuestionRow
from analysis.benchmarks.tasks.base import (
    LETTERS,
    ONLY_THE_LETTER,
    Benchmark,
    Question,
    choice_columns,
    letter,
    listed,
    register,
)


@register
class MMStar(Benchmark):
    """Choices in six categories of equal size."""

    name, title, split, size = "mmstar", "MMStar", "val", 1500
    columns = ("question", "answer", "category", "l2_category")
    suffix = f"\n{ONLY_THE_LETTER}"

    def question(self, row: QuestionRow) -> Question:
        """Its Parquet has the choices inside the question, VLMEvalKit's TSV in columns."""
        choices = choice_columns(row)
        text = str(row.values["question"]) + ("\nOptions:" if choices else "") + listed(choices, "\n{}: {}")
        groups = {"category": str(row.values["category"]).lower()}
        answer = letter(row.values["answer"])
        return Question(row.name("index"), text, (answer,), choices or dict.fromkeys("ABCD", ""), groups, row.image)

    def parse(self, question: Question, answer: str) -> str | None:
        """The letter that the script would compare."""
        answer = answer.lower().strip().replace("\n", " ")
        for start in ("", "(", "option ", "the answer is "):
            name = answer[len(start) : len(start) + 1].upper()
            if answer.startswith(start) and name and name in LETTERS and name in question.choices:
                return name
        return None
