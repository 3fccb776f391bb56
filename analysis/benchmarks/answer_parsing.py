"""How an answer is read and scored: each benchmark's own rule.

- **CV-Bench** (Tong et al., 2024, arXiv:2406.16860). Its authors publish no reading rule; that of OLA-VLM's evaluation
  takes the first letter in brackets, else the first character. Here the letter must be one of the question's, and a
  first character must stand alone (`A`, `B.`, `c)`; in `Apple` it is no answer). An answer that is the text of exactly
  one choice counts as that choice, as in VLMEvalKit.
- **MMStar** (Chen et al., 2024, arXiv:2403.20330): its evaluation script. In lower case, the letter is the first
  character, or what follows `(`, `option ` or `the answer is `, each only at the very beginning.
- **RealWorldQA** (xAI, 2024) has no script; the rule is that of lmms-eval: exact match in lower case without a final
  full stop, after number words have become digits and the text of a choice its letter. A letter in brackets, or one
  before its full stop and text (`B. Left`), is read too.
- **OK-VQA** (Marino et al., 2019, arXiv:1906.00067): VQA accuracy (Antol et al., 2015, arXiv:1505.00468, sec. 5.1)
  with the official script's normalisation, of the answer and of all ten people's alike. The script leaves people's
  articles and capitals as they are, which lmms-eval does not, and OK-VQA's published numbers are made as here.

An answer that cannot be read is wrong, and counted.
"""

import re
from collections.abc import Callable

from analysis.benchmarks.tasks import LETTERS, Question

LETTER_IN_BRACKETS = re.compile(r"\(([A-Ja-j])\)")
LETTER_ALONE = re.compile(r"([A-Ja-j])(?:[.):,]|$)")
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}


def _plain(text: str) -> str:
    """In lower case, on one line, without a final full stop."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def _choice_said(question: Question, said: str) -> str | None:
    """The letter of the one choice whose text the whole answer is."""
    same = [letter for letter, text in question.choices.items() if text and _plain(text) == _plain(said)]
    return same[0] if len(same) == 1 else None


def read_cvbench(question: Question, said: str) -> str | None:
    """The letter that an answer to CV-Bench means; None where it cannot be read."""
    said = said.strip()
    found = LETTER_IN_BRACKETS.search(said)
    if found is None:
        chosen = _choice_said(question, said)
        if chosen is not None:
            return chosen
        found = LETTER_ALONE.match(said)
    return found[1].upper() if found and found[1].upper() in question.choices else None


def read_mmstar(question: Question, said: str) -> str | None:
    """The letter that MMStar's script would compare with the right one; None where there is none."""
    said = said.lower().strip().replace("\n", " ")
    for start in ("", "(", "option ", "the answer is "):
        letter = said[len(start) : len(start) + 1].upper()
        if said.startswith(start) and letter and letter in LETTERS and letter in question.choices:
            return letter
    return None


def read_realworldqa(question: Question, said: str) -> str | None:
    """The letter, or the normalised answer where the question has no choices; None where it cannot be read."""
    plain = _plain(said)
    plain = NUMBERS.get(plain, plain)
    if not question.choices:
        return plain or None
    chosen = _choice_said(question, said)
    if chosen:
        return chosen
    found = LETTER_IN_BRACKETS.match(said.strip()) or LETTER_ALONE.match(said.strip())
    return found[1].upper() if found and found[1].upper() in question.choices else None


def read_okvqa(question: Question, said: str) -> str | None:
    """The normalised answer; None where nothing is left of it."""
    return normalised(said) or None


READERS: dict[str, Callable[[Question, str], str | None]] = {
    "cvbench": read_cvbench,
    "mmstar": read_mmstar,
    "realworldqa": read_realworldqa,
    "okvqa": read_okvqa,
}


def score(benchmark: str, question: Question, read: str | None) -> float:
    """What a read answer is worth, 0 to 1; nothing where it could not be read."""
    if read is None:
        return 0.0
    if benchmark == "okvqa":
        return vqa_accuracy(read, [normalised(answer) for answer in question.answers])
    if benchmark == "realworldqa" and not question.choices:
        right = _plain(question.answers[0])
        return float(read == NUMBERS.get(right, right))
    return float(read.upper() == question.answers[0].strip().upper())


def vqa_accuracy(said: str, people: list[str]) -> float:
    """Mean, over leaving out one person at a time, of min(1, others who said the same / 3).

    Args:
        said: a normalised answer.
        people: normalised answers, ten as a rule.
    """
    same = people.count(said)
    others = (same - (answer == said) for answer in people)
    return sum(min(1.0, number / 3) for number in others) / len(people)


# The tables of the VQA evaluation script, from their right-hand sides: it knows each form with one apostrophe left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place in (place for place, sign in enumerate(form) if sign == "'")
} | {"somebody'd": "somebodyd"}
MANUAL = NUMBERS | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
DIGITS_WITH_COMMA = re.compile(r"\d,\d")


def normalised(text: str) -> str:
    """An answer as the official VQA evaluation compares it: punctuation, number words, articles, apostrophes.

    A sign of punctuation goes without trace where it stands beside a blank anywhere in the answer, or the answer has a
    comma between digits; elsewhere a blank takes its place.
    """
    text = whole = text.replace("\n", " ").replace("\t", " ").strip()
    digits = DIGITS_WITH_COMMA.search(whole) is not None
    for sign in PUNCTUATION:
        beside = f"{sign} " in whole or f" {sign}" in whole
        text = text.replace(sign, "" if beside or digits else " ")
    words = (MANUAL.get(word, word) for word in FULL_STOP.sub("", text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
