"""CV-Bench (Tong et al., 2024, arXiv:2406.16860; `nyu-visionx/CV-Bench`: Parquet, or JSONL next to `img/`).

Its authors publish no parsing rule; that of OLA-VLM's evaluation takes the first letter in brackets, else the first
character. Here the letter must be one of the question's, and a first character must stand alone (`A`, `B.`, `c)`;
`Apple` is unreadable). An answer that is the text of exactly one choice means that choice, as in VLMEvalKit.
"""

from collections.abc import Sequence

from analysis.benchmarks.files import QuestionRow
from analysis.benchmarks.tasks.base import (
    LETTER_ALONE,
    LETTER_IN_BRACKETS,
    LETTERS,
    Benchmark,
    Part,
    Question,
    choice_by_text,
    choice_columns,
    letter,
    listed,
    register,
)


@register
class CVBench(Benchmark):
    """Choices about objects in 2D (ADE20K, COCO) and 3D (Omni3D)."""

    name, title, split, size = "cvbench", "CV-Bench", "test", 2638
    columns = ("type", "task", "question", "answer", "source")
    suffix = "\nAnswer with the letter of the right choice alone, as in (A)."
    part_labels = (("2d", "2D"), ("3d", "3D"), ("ade20k", "ADE20K"), ("coco", "COCO"), ("omni3d", "Omni3D"))

    def question(self, row: QuestionRow) -> Question:
        """Uses the published prompt, or builds it."""
        values = row.values
        choices = choice_columns(row) or dict(zip(LETTERS, map(str, values["choices"]), strict=False))
        prompt = values.get("prompt") or (
            f"{values['question']} Select from the following choices." + listed(choices, "\n({}) {}")
        )
        answer = letter(values["answer"])
        if answer not in choices:
            raise ValueError(f"the answer {answer} is none of {len(choices)} choices")
        groups = {name: str(values[name]).lower() for name in ("type", "task", "source")}
        return Question(row.name("idx", "index"), str(prompt), (answer,), choices, groups, row.image)

    def parse(self, question: Question, answer: str) -> str | None:
        """The letter in brackets, the choice of this text, or a letter alone."""
        answer = answer.strip()
        match = LETTER_IN_BRACKETS.search(answer)
        if match is None:
            choice = choice_by_text(question, answer)
            if choice is not None:
                return choice
            match = LETTER_ALONE.match(answer)
        return match[1].upper() if match and match[1].upper() in question.choices else None

    def parts(self, groups: Sequence[dict[str, str]]) -> list[Part]:
        """The whole is the mean of 2D and 3D, and each of these the mean over its sources, as on the data set's card.

        There is no overall score if only one of the two was evaluated.
        """
        parts: list[Part] = []
        for kind in sorted({group["type"] for group in groups}):
            own = [group for group in groups if group["type"] == kind]
            tasks, sources = (sorted({group[name] for group in own}) for name in ("task", "source"))
            parts.append(Part(kind, [(1 / len(sources), {"type": kind, "source": source}) for source in sources]))
            parts += [Part(f"{kind}/{task}", [(1.0, {"type": kind, "task": task})]) for task in tasks]
            if len(sources) > 1:
                parts += [Part(f"{kind}/{source}", [(1.0, {"type": kind, "source": source})]) for source in sources]
        kinds = [part for part in parts if "/" not in part.name]
        strata = [(weight / len(kinds), chosen) for part in kinds for weight, chosen in part.strata]
        return [Part("", strata), *parts] if len(kinds) > 1 else parts
