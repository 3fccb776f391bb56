"""Accuracies of a benchmark's parts, from answers question by question, and their intervals over images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.benchmarks.tasks import BENCHMARKS
from analysis.evaluation.bootstrap import Statistic, bootstrap
from analysis.evaluation.registry import ACCURACY
from analysis.evaluation.scores import ScoreKey, Summary
from probing.utils.files import read_json_lines


@dataclass(frozen=True)
class Answered:
    """One question and its answer, a line of `answers.jsonl`.

    Attributes:
        question: its name.
        groups: what it belongs to.
        image: hash of the image file; questions about one image are resampled together.
        said: what the checkpoint wrote.
        read: what the benchmark's rule reads in that; None where it reads nothing.
        right: the right answer, or all that people gave.
        score: 0 to 1.
        guess: what guessing scores on average; None where the question is open.
    """

    question: str
    groups: dict[str, str]
    image: str
    said: str
    read: str | None
    right: list[str]
    score: float
    guess: float | None


def read_answers(file: Path) -> list[Answered]:
    """The answers of a finished run, from its `answers.jsonl`; raises ValueError where a score is none."""
    found = [Answered(**line) for line in read_json_lines(file)]
    for one in found:
        if not isinstance(one.score, float | int) or not 0 <= one.score <= 1:
            raise ValueError(f"the score of question {one.question} is {one.score!r}")
    return found


Cell = tuple[float, Callable[[Answered], bool]]
"""A weight, and of which questions the accuracy has it."""
Part = tuple[str, list[Cell]]
"""Name (empty for the whole benchmark, else `2d` or `2d/count`), and what its accuracy is the weighted mean of."""


def parts(benchmark: str, answered: Sequence[Answered]) -> list[Part]:
    """What accuracies a benchmark has, the overall one first.

    CV-Bench's is the mean of 2D and 3D, and each of these the mean over its sources (ADE20K and COCO; Omni3D), as its
    card says. Where only one of the two is there, there is no overall accuracy. MMStar's categories are of equal size,
    and its overall accuracy is that of all questions.
    """
    if benchmark != "cvbench":
        found: list[Part] = [("", [(1.0, lambda one: True)])]
        for category in dict.fromkeys(one.groups.get("category", "") for one in answered):
            if category:
                found.append((category, [(1.0, _in(category=category))]))
        return found
    types = sorted({one.groups["type"] for one in answered})
    sources = {kind: sorted({one.groups["source"] for one in answered if one.groups["type"] == kind}) for kind in types}
    of_type = {
        kind: [(1 / len(names), _in(type=kind, source=name)) for name in names] for kind, names in sources.items()
    }
    whole = [(weight / len(types), chosen) for kind in types for weight, chosen in of_type[kind]]
    found = [("", whole)] if len(types) > 1 else []
    for kind in types:
        found.append((kind, of_type[kind]))
        for field, names in (("task", sorted({o.groups["task"] for o in answered if o.groups["type"] == kind})),
                             ("source", sources[kind] if len(sources[kind]) > 1 else [])):  # fmt: skip
            for name in names:
                found.append((f"{kind}/{name}", [(1.0, _in(**{"type": kind, field: name}))]))
    return found


def _in(**groups: str) -> Callable[[Answered], bool]:
    return lambda one: all(one.groups[field] == name for field, name in groups.items())


def masks_and_weights(
    cells: Sequence[Cell], answered: Sequence[Answered]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(sets, questions), which questions are in which set; and (sets), their weights."""
    masks = np.array([[chosen(one) for one in answered] for _, chosen in cells])
    return masks, np.array([weight for weight, _ in cells])


def images_of(answered: Sequence[Answered]) -> NDArray[np.int64]:
    """(questions), the number of the image that each is about."""
    places = {name: place for place, name in enumerate(dict.fromkeys(one.image for one in answered))}
    return np.array([places[one.image] for one in answered])


def summarise(benchmark: str, answered: Sequence[Answered]) -> Iterator[Summary]:
    """Rows of `results.csv`: accuracy of every part, with what guessing scores, and the share that could not be read.

    The intervals are over images: questions about the same one are resampled together.
    """
    split = BENCHMARKS[benchmark].split
    scores = np.array([one.score for one in answered])
    unread = np.array([float(one.read is None) for one in answered])
    guesses = np.array([np.nan if one.guess is None else one.guess for one in answered])
    images = images_of(answered)
    for part, cells in parts(benchmark, answered):
        masks, weights = masks_and_weights(cells, answered)
        count = int(masks.any(axis=0).sum())
        chance = float(sum(weight * guesses[mask].mean() for weight, mask in zip(weights, masks, strict=True)))
        for metric, values, by_chance in ((ACCURACY, scores, chance), ("unreadable", unread, np.nan)):
            interval = bootstrap(sums_by_image(values, masks, images)[None], weighted_mean(weights))
            yield Summary(ScoreKey("", "", "", "none", metric, benchmark, part), split, "0", interval, count, by_chance)


def sums_by_image(
    values: NDArray[np.float64], masks: NDArray[np.bool_], images: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What every image adds to the means of some sets of questions.

    Args:
        values: (questions).
        masks: (sets, questions).
        images: (questions), number of the image that each is about.

    Returns:
        (images, 2 * sets): sum and number of the questions of each set; images without any are left out.
    """
    sums = np.zeros((images.max() + 1, 2 * len(masks)))
    for place, mask in enumerate(masks):
        np.add.at(sums[:, 2 * place], images[mask], values[mask])
        np.add.at(sums[:, 2 * place + 1], images[mask], 1)
    return sums[sums[:, 1::2].any(axis=1)]


def weighted_mean(weights: NDArray[np.float64]) -> Statistic:
    """Weighted mean of the sets' means, of sums over images as `sums_by_image` has them.

    Not a number where a resample has no question of one of them.
    """

    def statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums[..., 0::2] / sums[..., 1::2]) @ weights

    return statistic
