"""OK-VQA (Marino et al., 2019, arXiv:1906.00067): the official JSON files next to COCO's images, or `lmms-lab/OK-VQA`.

Scored by VQA accuracy (Antol et al., 2015, arXiv:1505.00468, sec. 5.1) with the official script's normalisation of the
answer and of all ten people's answers; lmms-eval does not normalise people's articles and capitals.
"""

import json
import re
from pathlib import Path
from typing import Any

from analysis.benchmarks.files import QuestionRow, file_row
from analysis.benchmarks.tasks.base import NUMBERS, Benchmark, Question, register
from probing.utils.errors import BROKEN, UserError
from probing.utils.paths import is_file


@register
class OKVQA(Benchmark):
    """Open questions with ten people's answers each."""

    name, title, split, size = "okvqa", "OK-VQA", "val2014", 5046
    columns = ("question", "answers", "question_id")
    suffix = "\nAnswer the question using a single word or phrase."

    def rows(self, source: Path) -> list[QuestionRow]:
        """Reads the official files where they exist, else those of other data sets' forms."""
        files = sorted(source.rglob("OpenEnded_mscoco_*_questions.json")) if source.is_dir() else []
        if not files:
            return super().rows(source)
        file = next((file for file in files if "val2014" in file.name), files[0])
        split = file.name.removeprefix("OpenEnded_mscoco_").removesuffix("_questions.json")
        annotations = file.parent / f"mscoco_{split}_annotations.json"
        if not annotations.exists():
            raise UserError(f"{annotations} is missing; put it next to {file.name}")
        try:
            entries = json.loads(annotations.read_text(encoding="utf-8"))["annotations"]
            answers = {entry["question_id"]: entry["answers"] for entry in entries}
            return [
                file_row(file, n, entry | {"answers": answers[entry["question_id"]]}, _image(source, split, entry))
                for n, entry in enumerate(json.loads(file.read_text(encoding="utf-8"))["questions"])
            ]
        except BROKEN as error:
            raise UserError(
                f"{file} and {annotations.name} do not fit ({type(error).__name__}: {error}); get both again"
            ) from None

    def question(self, row: QuestionRow) -> Question:
        """Answers are texts, or objects with the text in `answer`."""
        if isinstance(row.values["answers"], str) or not len(row.values["answers"]):
            raise ValueError("the answers are no list")
        people = tuple(str(one["answer"] if isinstance(one, dict) else one) for one in row.values["answers"])
        return Question(row.name("question_id"), str(row.values["question"]), people, {}, {}, row.image)

    def parse(self, question: Question, answer: str) -> str | None:
        """The normalised answer."""
        return normalised(answer) or None

    def score(self, question: Question, parsed: str) -> float:
        """VQA accuracy."""
        return vqa_accuracy(parsed, [normalised(answer) for answer in question.answers])


def _image(source: Path, split: str, entry: dict[str, Any]) -> Path:
    """COCO's image: in its split of 2014, or under the name that it has since 2017."""
    number = int(entry["image_id"])
    name = f"COCO_{split}_{number:012d}.jpg"
    paths = [source / split / name, source / name]
    paths += [source / other / f"{number:012d}.jpg" for other in ("train2017", "val2017")]
    return next((path for path in paths if is_file(path)), paths[0])


def vqa_accuracy(answer: str, people: list[str]) -> float:
    """Mean, over leaving out one person at a time, of min(1, others with the same answer / 3); all normalised."""
    others = (people.count(answer) - (person == answer) for person in people)
    return sum(min(1.0, number / 3) for number in others) / len(people)


# The official script's table by its right-hand sides: it knows each form with one apostrophe left out.
_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
WORDS = {form[:i] + form[i + 1 :]: form for form in _FORMS.split() for i, sign in enumerate(form) if sign == "'"}
WORDS |= {"somebody'd": "somebodyd", "none": "0", "a": "", "an": "", "the": ""} | NUMBERS
"""Contractions, number words and articles, and what replaces them."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalised(text: str) -> str:
    """An answer as the official VQA evaluation compares it: punctuation, number words, articles, apostrophes.

    A punctuation sign is deleted if it is next to a blank anywhere in the answer, or the answer has a comma between
    digits; else a blank replaces it.
    """
    text = original = text.replace("\n", " ").replace("\t", " ").strip()
    digits = re.search(r"\d,\d", original) is not None
    for sign in PUNCTUATION:
        text = text.replace(sign, "" if digits or f"{sign} " in original or f" {sign}" in original else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    return " ".join(filter(None, (WORDS.get(word, word) for word in words)))
