"""Scores per image: kept in the run, so that any later comparison can be paired, and summarised in `results.csv`."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from analysis.depth_pairs import pair_accuracy
from analysis.segmentation import mean_iou
from analysis.statistics import bootstrap, share_mean
from probing.run import Run, whole_file, write_text

COLUMNS = (
    *("checkpoint", "teacher", "layer", "probe", "control", "metric", "protocol", "split", "seed"),
    *("value", "ci_low", "ci_high", "n"),
)
STATISTICS: dict[tuple[str, str], Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    ("da2k", "strict"): pair_accuracy,
    ("miou", "strict"): mean_iou,
    ("miou", "blind"): mean_iou,
}
"""How a metric and protocol follow from sums over images; the mean, where none is named here."""


@dataclass(frozen=True, order=True)
class Curve:
    """What one column of per-image scores belongs to."""

    teacher: str
    layer: str
    probe: str
    control: str
    metric: str
    protocol: str
    seed: int

    def key(self) -> str:
        """Name of its tensor in the score file."""
        return "/".join(map(str, vars(self).values()))

    @classmethod
    def from_key(cls, key: str) -> "Curve":
        """The inverse of `key`."""
        teacher, layer, probe, control, metric, protocol, seed = key.split("/")
        return cls(teacher, layer, probe, control, metric, protocol, int(seed))


Table = dict[Curve, NDArray[np.float32]]
"""Per curve (images), or (images, numbers) where a metric needs more than one number of each image."""


def score_file(run: Path, stem: str, split: str) -> Path:
    """Where the scores of one metric lie."""
    return run / "scores" / f"{stem}-{split}.safetensors"


def write_scores(file: Path, split: str, table: Table, names: list[str]) -> None:
    """Writes the scores of one metric and the names of the images they belong to."""
    with whole_file(file) as temporary:
        metadata = {"images": json.dumps(names), "split": split}
        save_file({curve.key(): np.ascontiguousarray(scores) for curve, scores in table.items()}, temporary, metadata)


def read_scores(file: Path) -> tuple[Table, list[str], str]:
    """Per-image scores of one metric, the images' names in the same order, and the split."""
    with safe_open(file, framework="np") as stored:
        metadata = stored.metadata()
        table = {Curve.from_key(key): stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        return table, json.loads(metadata["images"]), metadata["split"]


def write_results(run: Run) -> Path:
    """Writes `results.csv` from all scores of a run: one row per number, with its bootstrap interval."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for file in sorted((run.path / "scores").glob("*.safetensors")):
        table, _, split = read_scores(file)
        _write_rows(writer, run, table, split)
    target = run.path / "results.csv"
    write_text(target, buffer.getvalue())
    return target


def _place(curve: Curve) -> tuple[str | float, ...]:
    """Sorts the rows of a curve in the order of its layers, `final` last."""
    layer = float(curve.layer) if curve.layer.isdecimal() else math.inf
    return curve.metric, curve.protocol, curve.teacher, curve.probe, curve.control, layer


def _write_rows(writer: Any, run: Run, table: Table, split: str) -> None:
    name, seeds = run.manifest["checkpoint"]["name"], run.recipe.fit.seeds
    grouped: dict[Curve, dict[int, NDArray[np.float32]]] = {}
    for curve, scores in table.items():
        family = Curve(**{**vars(curve), "seed": 0})
        grouped.setdefault(family, {})[curve.seed] = scores
    for curve, by_seed in sorted(grouped.items(), key=lambda item: _place(item[0])):
        trained = curve.probe == "resampler"
        stacks: dict[str, NDArray[np.float32]] = {str(seed): s[None] for seed, s in by_seed.items()} if trained else {}
        if len(seeds) > 1 or not trained:
            pooled = "all" if len(seeds) > 1 else str(seeds[0])
            stacks[pooled] = np.stack(list(by_seed.values()))
        for seed, stack in stacks.items():
            interval = bootstrap(stack, STATISTICS.get((curve.metric, curve.protocol), share_mean))
            place = [name, curve.teacher, curve.layer, curve.probe, curve.control, curve.metric, curve.protocol]
            numbers = [f"{x:.8g}" for x in (interval.value, interval.low, interval.high)]
            writer.writerow([*place, split, seed, *numbers, stack.shape[1]])
