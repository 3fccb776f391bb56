"""Confidence intervals of statistics that a bootstrap over images would bias."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.evaluation.bootstrap import Interval


@dataclass(frozen=True)
class Jackknife:
    """A statistic of all images, and with each group of them left out.

    Attributes:
        whole: (seeds).
        left_out: (groups, seeds).
    """

    whole: NDArray[np.float64]
    left_out: NDArray[np.float64]

    @classmethod
    def compute(cls, statistic: Callable[[NDArray[np.bool_]], Sequence[float]], images: int) -> "Jackknife":
        """Computes a statistic per seed from masks over the images; ten groups, or half as many as images."""
        groups = min(10, images // 2)
        group = np.arange(images) % groups
        left_out = [statistic(group != number) for number in range(groups)]
        return cls(np.array(statistic(group >= 0)), np.array(left_out))

    @classmethod
    def mean(cls, several: Sequence["Jackknife"]) -> "Jackknife":
        """Averages several statistics of the same images, for example over layers."""
        return cls(np.mean([one.whole for one in several], axis=0), np.mean([one.left_out for one in several], axis=0))

    @classmethod
    def concatenate(cls, several: Sequence["Jackknife"]) -> "Jackknife":
        """Concatenates the seeds of a statistic of the same images."""
        whole = np.concatenate([one.whole for one in several])
        return cls(whole, np.concatenate([one.left_out for one in several], axis=1))

    def interval(self) -> Interval:
        """Returns the mean over seeds with a symmetric 95 % interval over images and seeds.

        A bootstrap would not do: repeated images narrow a covariance and raise a Fréchet distance. Instead, the spread
        of the values without one group is scaled up (delete-a-group jackknife; Kott, 2001). Where there are several
        seeds, their variance is added.
        """
        return _interval(self.whole.mean(), self.left_out.mean(axis=1), [self.whole])

    def interval_above(self, other: "Jackknife", seeds_paired: bool = False) -> Interval:
        """Returns the same for the difference from another statistic of the same images in the same groups.

        Args:
            other: what is subtracted.
            seeds_paired: seed k of one belongs to seed k of the other; otherwise they vary independently.
        """
        left_out = self.left_out.mean(axis=1) - other.left_out.mean(axis=1)
        seeds = [self.whole - other.whole] if seeds_paired else [self.whole, other.whole]
        return _interval(self.whole.mean() - other.whole.mean(), left_out, seeds)


def _interval(value: float, left_out: NDArray[np.float64], seeds: Sequence[NDArray[np.float64]]) -> Interval:
    """Returns the interval of a value from its spread over left-out groups and over the seeds of each of its terms."""
    groups = len(left_out)
    variance, freedom = (groups - 1) ** 2 / groups * np.var(left_out, ddof=1), groups - 1
    for values in (values for values in seeds if len(values) > 1):
        variance += np.var(values, ddof=1) / len(values)
        freedom = min(freedom, len(values) - 1)
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Interval(float(value), float(value) - reach, float(value) + reach)
