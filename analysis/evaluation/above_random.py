"""Paired differences between a checkpoint's probes and those of its random-weights control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.evaluation.bootstrap import Interval, paired_bootstrap
from analysis.evaluation.registry import metrics
from analysis.evaluation.scores import ScoreFile, ScoreKey, by_seed, finite_images, over_layers
from analysis.evaluation.seed_group import open_runs, read_scores
from probing.runs.directory import runs_in

MORE, AS_MUCH, LESS = "more than random weights", "random weights hold as much", "less than random weights"


def verdict(low: float, high: float) -> str:
    """States what the 95 % interval of "checkpoint minus random weights" shows, larger being better.

    The interval is above zero: more than random weights. It is below zero: less. It contains zero: as much.
    """
    return MORE if low > 0 else LESS if high < 0 else AS_MUCH


@dataclass(frozen=True)
class PairedScores:
    """Scores per image of a run, of the checkpoint and of random weights.

    Attributes:
        series: (seeds, images, …) by key, with seed 0.
    """

    series: Mapping[ScoreKey, NDArray[Any]]

    @classmethod
    def read(cls, path: Path, metric: str) -> "PairedScores":
        """Reads one metric of a run, or of a folder of runs that differ by their seed.

        Args:
            path: a run or a folder of runs; without scores per image there is no series.
            metric: as in `results.csv`.

        Raises:
            UserError: scores are broken, or those of a folder were made with different settings.
        """
        names = [name for name, one in metrics().items() if any(info.matches(metric) for info in one.infos)]
        runs = runs_in(path) or [path]
        stems = [file.name for name in names for file in sorted((runs[0] / "scores").glob(f"{name}-*.safetensors"))]
        if len(runs) > 1:
            found = read_scores(open_runs(path)) if stems else {}
            files = [file for name, file in found.items() if name in stems]
        else:
            files = [ScoreFile.read(runs[0] / "scores" / name) for name in stems]
        tables = [by_seed(file.table) for file in files]
        return cls({key: np.stack(list(seeds.values())) for table in tables for key, seeds in table.items()})

    def minus_random(self, key: ScoreKey, random_layer: str) -> tuple[Interval, int] | None:
        """Returns checkpoint minus random weights over the images that both have, and their number.

        Args:
            key: series of the checkpoint.
            random_layer: layer of the random weights.

        Returns:
            None if either has no scores per image.
        """
        own = self.series.get(replace(key, control="none", seed=0))
        random = self.series.get(replace(key, control="random", layer=random_layer, seed=0))
        if own is None or random is None or own.shape[1] != random.shape[1]:
            return None
        finite = finite_images(own) & finite_images(random)
        if not finite.any():
            return None
        tables: Sequence[NDArray[Any]] = [table[:, finite] for table in (own, random)]
        (one, statistic), (two, _) = (over_layers(key, [table]) for table in tables)
        return paired_bootstrap(one, two, statistic), int(finite.sum())
