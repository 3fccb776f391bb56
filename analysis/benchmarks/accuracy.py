"""Accuracies of a benchmark's parts from scored answers, with intervals over images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.benchmarks.tasks import BENCHMARKS
from analysis.benchmarks.tasks.base import Part
from analysis.evaluation.bootstrap import Statistic, bootstrap
from analysis.evaluation.registry import ACCURACY
from analysis.evaluation.scores import ScoreKey, Summary


@dataclass(frozen=True)
class ScoredAnswer:
    """One question and its answer, a line of `answers.jsonl`.

    Attributes:
        question: its name.
        groups: kind → group that it belongs to.
        image: hash of the image file; questions about one image are resampled together.
        answer: the checkpoint's.
        parsed: letter or text that the benchmark's rule finds in it; None where it is unreadable.
        correct: the correct answer, or all that people gave.
        score: 0 to 1.
        chance: expected score of guessing; None for an open question.
    """

    question: str
    groups: dict[str, str]
    image: str
    answer: str
    parsed: str | None
    correct: list[str]
    score: float
    chance: float | None


@dataclass(frozen=True)
class PartSums:
    """How the questions of one part add up.

    Attributes:
        masks: which questions are in which stratum, (strata, questions).
        weights: of the strata, (strata).
        images: index of the image of each question, (questions).
    """

    masks: NDArray[np.bool_]
    weights: NDArray[np.float64]
    images: NDArray[np.int64]

    @classmethod
    def of(cls, part: Part, answers: Sequence[ScoredAnswer]) -> "PartSums":
        """Finds the questions of each stratum."""
        index = {name: i for i, name in enumerate(dict.fromkeys(answer.image for answer in answers))}
        masks = [[chosen.items() <= answer.groups.items() for answer in answers] for _, chosen in part.strata]
        weights = np.array([weight for weight, _ in part.strata])
        return cls(np.array(masks), weights, np.array([index[answer.image] for answer in answers]))

    @property
    def count(self) -> int:
        """Number of questions of the part."""
        return int(self.masks.any(axis=0).sum())

    def table(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum and number of each stratum's values (questions) by image, (images, 2 * strata), without empty images."""
        sums = np.zeros((self.images.max() + 1, 2 * len(self.masks)))
        for row, mask in enumerate(self.masks):
            np.add.at(sums[:, 2 * row], self.images[mask], values[mask])
            np.add.at(sums[:, 2 * row + 1], self.images[mask], 1)
        return sums[sums[:, 1::2].any(axis=1)]

    @property
    def statistic(self) -> Statistic:
        """Weighted mean of the strata's means, from sums over images; NaN where a resample lacks a stratum."""

        def mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            with np.errstate(invalid="ignore", divide="ignore"):
                return (sums[..., 0::2] / sums[..., 1::2]) @ self.weights

        return mean


def summarise(benchmark: str, answers: Sequence[ScoredAnswer]) -> Iterator[Summary]:
    """Yields rows of `results.csv`: accuracy and chance of every part, and the share of unreadable answers."""
    known = BENCHMARKS[benchmark]
    scores = np.array([answer.score for answer in answers])
    unreadable = np.array([float(answer.parsed is None) for answer in answers])
    chances = np.array([np.nan if answer.chance is None else answer.chance for answer in answers])
    for part in known.parts([answer.groups for answer in answers]):
        sums = PartSums.of(part, answers)
        chance = float(
            sum(weight * chances[mask].mean() for weight, mask in zip(sums.weights, sums.masks, strict=True))
        )
        for metric, values, by_chance in ((ACCURACY, scores, chance), ("unreadable", unreadable, np.nan)):
            interval = bootstrap(sums.table(values)[None], sums.statistic)
            key = ScoreKey("", "", "", "none", metric, benchmark, part.name)
            yield Summary(key, known.split, "0", interval, sums.count, by_chance)
