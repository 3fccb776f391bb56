"""Scores per image: their keys, their files, and their summary `results.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from analysis.evaluation.bootstrap import Interval, Statistic, bootstrap, share_mean
from analysis.evaluation.jackknife import Jackknife
from analysis.evaluation.metrics.depth_pairs import pair_accuracy
from analysis.evaluation.metrics.segmentation import mean_iou
from analysis.evaluation.registry import describe
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, reading, write_text

if TYPE_CHECKING:
    from probing.models.finite import NotFinite
    from probing.runs.directory import Run

COLUMNS = (
    *("checkpoint", "teacher", "layer", "probe", "control", "metric", "protocol", "variant", "split", "seed"),
    *("value", "ci_low", "ci_high", "n", "chance"),
)
STATISTICS: dict[str, Statistic] = {
    "word_miou": mean_iou,
    "lens_miou": mean_iou,
    "word_cosine": pair_accuracy,
    "word_retrieval": pair_accuracy,
    "lens_retrieval": pair_accuracy,
}
"""Sums over images → value, for metrics of `probing align` that are no mean over images."""
ADVICE = "remove it and evaluate again"
EMPTY = Interval(math.nan, math.nan, math.nan)
"""The interval over no image."""
POOLED = "pooled"
"""Mean states of the first images alone, in the unfinished passes of `probing align`."""
ERASED = "leace"
"""In the column `probe`: the teacher's feature is not read but erased, see `probing erase`."""
AVERAGE = "mean"
"""In the column `layer`: the mean over the probed layers 1 … L, as in the paper's Table 8; see `averages_final`."""


@dataclass(frozen=True, order=True)
class ScoreKey:
    """Identifies one series of per-image scores, by the columns of `results.csv`."""

    teacher: str
    layer: str
    probe: str
    control: str
    metric: str
    protocol: str = ""
    variant: str = ""
    seed: int = 0

    def key(self) -> str:
        """Returns the name of its tensor in a file."""
        return "/".join(map(str, vars(self).values()))

    @classmethod
    def from_key(cls, key: str) -> ScoreKey:
        """Inverts `key`."""
        teacher, layer, probe, control, metric, protocol, variant, seed = key.split("/")
        return cls(teacher, layer, probe, control, metric, protocol, variant, int(seed))

    def order(self) -> tuple[Any, ...]:
        """Sorts by metric and layer, `final` last."""
        layer = float(self.layer) if self.layer.isdecimal() else math.inf
        return self.metric, self.protocol, self.variant, self.teacher, self.probe, self.control, layer, self.seed


Table = dict[ScoreKey, NDArray[Any]]
"""Values (images) or (images, …) by series."""


@dataclass
class ScoreFile:
    """The scores of one metric.

    Attributes:
        table: values per image.
        names: the images, in the order of the rows.
        split: name of the images' split.
        settings: what the scores depend on besides the run.
        sums: series that are stored as one sum over images.
        done: number of images processed, readable or not; an unfinished pass resumes after them.
        skipped: image, split and reason of those that could not be read.
        not_finite: `layer NAME` or `teacher NAME` → rows of images left out there; their scores are NaN.
        chance: metric → value by chance, where it depends on the data.
        conditions: what two checkpoints must share for their scores to be compared, besides what their runs share.
    """

    table: Table
    names: list[str]
    split: str
    settings: str
    sums: Table = field(default_factory=dict)
    done: int = 0
    skipped: list[list[str]] = field(default_factory=list)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> ScoreFile:
        """Inverts `write`; raises UserError if the file is missing or broken."""
        with reading(file, ADVICE), safe_open(file, framework="np") as stored:
            tables: dict[str, Table] = {"image": {}, "sum": {}}
            for name in stored.keys():  # noqa: SIM118
                kind, _, key = name.partition(":")
                tables[kind][ScoreKey.from_key(key)] = stored.get_tensor(name)
            scores = cls(table=tables["image"], sums=tables["sum"], **json.loads(stored.metadata()["pass"]))
            for key, values in scores.table.items():
                fits = len(values) <= len(scores.names) if key.metric == POOLED else len(values) == len(scores.names)
                if not fits:
                    raise ValueError("a series has a wrong number of images")
        return scores

    def write(self, file: Path) -> None:
        """Writes tensors `image:<key>` and `sum:<key>`; everything else goes to the metadata."""
        tensors = {f"image:{key.key()}": np.ascontiguousarray(values) for key, values in self.table.items()}
        tensors |= {f"sum:{key.key()}": np.ascontiguousarray(total) for key, total in self.sums.items()}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("table", "sums")}
        with atomic_file(file) as temporary:
            save_file(tensors, temporary, {"pass": json.dumps(rest)})

    def merge(self, other: ScoreFile, images: Sequence[str]) -> None:
        """Adds the series of another file with the same settings.

        A control can lack an image that others have, such as one without caption; its scores are NaN there, and its
        pictures 0.

        Args:
            other: the file.
            images: order of the images.
        """
        either = {*self.names, *other.names}
        names = [name for name in images if name in either]
        one, two = self._over(names), other._over(names)
        self.table, self.sums, self.names = two.table | one.table, other.sums | self.sums, names
        self.not_finite = two.not_finite | one.not_finite

    def _over(self, names: list[str]) -> ScoreFile:
        """Returns the same with a row for each of these images."""
        if names == self.names:
            return self
        row = {name: index for index, name in enumerate(names)}
        rows = [row[name] for name in self.names]

        def spread(values: NDArray[Any]) -> NDArray[Any]:
            picture = values.dtype in (np.uint8, np.float16)
            dtype = values.dtype if picture else np.float32
            more = np.full((len(names), *values.shape[1:]), 0 if picture else np.nan, dtype=dtype)
            more[rows] = values
            return more

        table = {key: spread(values) for key, values in self.table.items()}
        not_finite = {place: [rows[index] for index in own] for place, own in self.not_finite.items()}
        return replace(self, table=table, names=names, not_finite=not_finite)

    def left_out(self) -> NotFinite:
        """Returns `not_finite` as masks over the images."""
        masks: NotFinite = {}
        for place, rows in self.not_finite.items():
            kind, _, name = place.partition(" ")
            masks[kind, name] = np.isin(np.arange(len(self.names)), rows)
        return masks


def read_if_fits(file: Path, settings: str) -> ScoreFile | None:
    """Reads a score file; None if it is missing, broken, or made with other settings."""
    try:
        scores = ScoreFile.read(file)
    except UserError:
        return None
    return scores if scores.settings == settings else None


def score_file(run: Path, stem: str, split: str) -> Path:
    """Returns the file of a recorder's values."""
    return run / f"{stem}-{split}.safetensors"


@dataclass(frozen=True)
class Summary:
    """One row of `results.csv`.

    Attributes:
        key: its columns; the seed is overridden by `seed`.
        split: name of the images' split.
        seed: a number, or `all`.
        interval: value and interval.
        n: number of images.
        chance: value by chance; NaN if unknown.
        images: hash of their names and of how they were generated, where no scores name them.
        jackknife: source of the interval, if it is no bootstrap.
    """

    key: ScoreKey
    split: str
    seed: str
    interval: Interval
    n: int
    chance: float = math.nan
    images: str = ""
    jackknife: Jackknife | None = None


def write_summaries(file: Path, rows: Sequence[Summary]) -> None:
    """Writes rows that cannot be computed from stored scores."""
    plain = []
    for row in rows:
        values = {**vars(row), "key": row.key.key(), "interval": vars(row.interval)}
        if row.jackknife is not None:
            values["jackknife"] = {name: array.tolist() for name, array in vars(row.jackknife).items()}
        plain.append(values)
    write_text(file, json.dumps(plain) + "\n")


def read_summaries(file: Path) -> list[Summary]:
    """Inverts `write_summaries`; raises UserError if the file is broken."""
    rows = []
    with reading(file, ADVICE):
        for row in json.loads(file.read_text(encoding="utf-8")):
            values = {**row, "key": ScoreKey.from_key(row["key"]), "interval": Interval(**row["interval"])}
            if row["jackknife"]:
                values["jackknife"] = Jackknife(**{name: np.array(array) for name, array in row["jackknife"].items()})
            rows.append(Summary(**values))
    return rows


def by_seed(table: Mapping[ScoreKey, NDArray[Any]]) -> dict[ScoreKey, dict[int, NDArray[Any]]]:
    """Groups series that differ by nothing but their seed, in the order of `results.csv`."""
    grouped: dict[ScoreKey, dict[int, NDArray[Any]]] = {}
    for key in sorted(table, key=ScoreKey.order):
        grouped.setdefault(replace(key, seed=0), {})[key.seed] = table[key]
    return grouped


def seed_stacks(
    table: Mapping[ScoreKey, NDArray[Any]], seeds: Sequence[int], with_final: bool
) -> Iterator[tuple[ScoreKey, str, list[NDArray[Any]]]]:
    """Yields key, seed and values of every row of `results.csv`.

    Every seed of a trained probe is a row, and all seeds together are another. Values are (seeds, images, …), of one
    layer, or of each layer for a mean over layers.
    """
    means: dict[tuple[ScoreKey, str], list[NDArray[Any]]] = {}
    for key, values in by_seed(table).items():
        trained = key.probe == "resampler"
        stacks = {str(seed): array[None] for seed, array in values.items()} if trained else {}
        if len(seeds) > 1 or not trained:
            stacks["all" if len(seeds) > 1 else str(seeds[0])] = np.stack(list(values.values()))
        for seed, stack in stacks.items():
            yield key, seed, [stack]
            if is_averaged(key.layer, with_final):
                means.setdefault((replace(key, layer=AVERAGE), seed), []).append(stack)
    for (key, seed), layers in means.items():
        yield key, seed, layers


def is_averaged(layer: str, with_final: bool) -> bool:
    """Whether the mean over layers includes a layer: those after a decoder block, and perhaps `final`."""
    return (layer.isdecimal() and int(layer) > 0) or (with_final and layer == "final")


def averages_final(*manifests: dict[str, Any]) -> bool:
    """Whether means over layers include `final`, as the last layer of imported probes.

    The published probes of the last layer read the state after the final norm, and OLA-VLM averages over all of them.
    """
    return all(manifest.get("fit", {}).get("imported") for manifest in manifests)


def summaries(scores: ScoreFile, seeds: Sequence[int], with_final: bool = False) -> Iterator[Summary]:
    """Yields the rows of `results.csv` from one file of scores.

    Args:
        scores: of one metric.
        seeds: of the trained probes.
        with_final: whether means over layers include `final`; see `averages_final`.
    """
    for key, seed, layers in seed_stacks(scores.table, seeds, with_final):
        table, statistic = over_layers(key, layers)
        table = table[:, finite_images(table)]
        interval = bootstrap(table, statistic) if table.shape[1] else EMPTY
        chance = scores.chance.get(key.metric, describe(key.metric, key.protocol).chance)
        yield Summary(key, scores.split, seed, interval, table.shape[1], chance)


def finite_images(*tables: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns which images (n) have finite scores in all tables (seeds, n, …)."""
    flags = (np.isfinite(table).reshape(*table.shape[:2], -1) for table in tables)
    return np.logical_and.reduce([flag.all(axis=(0, 2)) for flag in flags])


def over_layers(key: ScoreKey, layers: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], Statistic]:
    """Returns the mean over layers of a metric as one statistic.

    Args:
        key: names the metric.
        layers: scores of each, (seeds, images) or (seeds, images, numbers).

    Returns:
        The layers' numbers concatenated, (seeds, images, layers · numbers), and the statistic of their sums.
    """
    statistic = describe(key.metric, key.protocol).statistic or STATISTICS.get(key.metric, share_mean)
    tables = [layer[..., None] if layer.ndim == 2 else layer for layer in layers]

    def mean(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        return statistic(totals.reshape(*totals.shape[:-1], len(tables), -1)).mean(axis=-1)

    return np.concatenate(tables, axis=-1), mean


def write_results(run: Run) -> Path:
    """Writes `results.csv` from all scores of a run."""
    seeds, with_final = run.recipe.fit.seeds, averages_final(run.manifest)
    rows: list[Summary] = []
    for file in sorted((run.path / "scores").glob("*.safetensors")):
        rows += summaries(ScoreFile.read(file), seeds, with_final)
    for file in sorted((run.path / "scores").glob("*.json")):
        rows += read_summaries(file)
    return write_rows(run.path / "results.csv", run.manifest["checkpoint"]["name"], rows)


def write_rows(target: Path, checkpoint: str, rows: Iterable[Summary]) -> Path:
    """Writes a file of results; a number that does not exist is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        names = [checkpoint, *list(vars(row.key).values())[:-1]]
        *numbers, chance = ["" if math.isnan(x) else f"{x:.8g}" for x in (*vars(row.interval).values(), row.chance)]
        writer.writerow([*names, row.split, row.seed, *numbers, row.n, chance])
    write_text(target, buffer.getvalue())
    return target
