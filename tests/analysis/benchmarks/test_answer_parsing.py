"""How answers are parsed and scored: crafted ones, and each published rule against brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.benchmarks.run import scored
from analysis.benchmarks.tasks import BENCHMARKS, Question
from analysis.benchmarks.tasks.okvqa import normalised, vqa_accuracy

FOUR = {"A": "3", "B": "2", "C": "a dog", "D": "Apple pie"}


def score(name, item, answer):
    return scored(name, item, "image", answer).score


def question(right="B", choices=None, people=()):
    return Question("q", "?", tuple(people) or (right,), FOUR if choices is None else choices, {}, bytes)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("b", "B"),
        (" (b) ", "B"),
        ("B.", "B"),
        ("c) a dog", "C"),
        ("The answer is (C).", "C"),
        ("(A) or (B)", "A"),
        ("2", "B"),
        ("A dog.", "C"),  # the text of a choice, whatever its first character
        ("apple pie", "D"),
        ("Apple", None),  # the first letter of a word is no answer
        ("A cat", None),
        ("the second", None),
        ("", None),
        ("(F)", None),  # no letter of this question
        ("E", None),
    ],
)
def test_cvbench_answers(said, read):
    assert BENCHMARKS["cvbench"].parse(question(), said) == read
    assert score("cvbench", question(right="B"), said) == (read == "B")


def test_text_of_two_choices_is_unreadable():
    assert BENCHMARKS["cvbench"].parse(question(choices={"A": "left", "B": "Left."}), "left") is None


PIECES = st.sampled_from(
    ["a", "B", "c", "d", "e", "(", ")", "option ", "Option", "the answer is ", " ", "\n", ".", "xy"]
)


@given(st.lists(PIECES, max_size=6).map("".join), st.sampled_from("ABCD"))
def test_mmstar_is_scored_as_by_its_script(said, right):
    """The script's four comparisons of characters at fixed positions; answers on which they fail are wrong."""
    answer, predict = right.lower(), said.lower().strip().replace("\n", " ")
    at = dict(enumerate(predict))
    expected = (
        answer == at.get(0)
        or (at.get(0) == "(" and answer == at.get(1))
        or (predict[0:7] == "option " and answer == at.get(7))
        or (predict[0:14] == "the answer is " and answer == at.get(14))
    )
    item = question(right, dict.fromkeys("ABCD", ""))
    read = BENCHMARKS["mmstar"].parse(item, said)
    assert score("mmstar", item, said) == expected
    assert read is not None or not expected


def test_mmstar_answers():
    item = question("A", dict.fromkeys("ABCD", ""))
    said = ["A", "(b", "Option C", "the answer is d.", "", "I think A", "the answer is (A)", "7"]
    assert [BENCHMARKS["mmstar"].parse(item, one) for one in said] == ["A", "B", "C", "D", None, None, None, None]


@pytest.mark.parametrize(
    ("choices", "right", "said", "worth", "readable"),
    [
        ({"A": "Left", "B": "Right"}, "B", "B", 1, True),
        ({"A": "Left", "B": "Right"}, "B", "right.", 1, True),
        ({"A": "Left", "B": "Right"}, "B", "(b)", 1, True),
        ({"A": "Left", "B": "Right"}, "B", "B. Right", 1, True),
        ({"A": "Left", "B": "Right"}, "B", "A", 0, True),
        ({"A": "Left", "B": "Right"}, "B", "to the right", 0, False),
        ({}, "3", "Three.", 1, True),
        ({}, "Two", "2", 1, True),
        ({}, "Yes", "yes", 1, True),
        ({}, "Yes", "Yes, it is", 0, True),
        ({}, "Yes", " . ", 0, False),
    ],
)
def test_realworldqa_answers(choices, right, said, worth, readable):
    item = question(right, choices)
    read = BENCHMARKS["realworldqa"].parse(item, said)
    assert (score("realworldqa", item, said), read is not None) == (worth, readable)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("a cat and an owl", "cat and owl"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("ice-cream", "ice cream"),
        ("yes, sir", "yes sir"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'dve", "yall'dve"),  # two apostrophes short: the script does not know it
        ("oclock", "o'clock"),
        ("the", ""),
        ("new\nyork\tcity", "new york city"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("what?!", "what"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalised(text) == expected


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=10), st.sampled_from("abcd"))
def test_vqa_accuracy_leaves_each_person_out_in_turn(people, said):
    total = 0.0
    for left_out in range(len(people)):
        agreeing = [answer for place, answer in enumerate(people) if place != left_out and answer == said]
        total += min(1.0, len(agreeing) / 3)
    assert vqa_accuracy(said, people) == pytest.approx(total / len(people))


def test_okvqa_normalises_both_sides():
    item = question(choices={}, people=["A surf board"] * 3 + ["surfing"] * 7)
    assert score("okvqa", item, "surfboard") == 0
    assert score("okvqa", item, "The surf board.") == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert score("okvqa", item, "the") == 0
