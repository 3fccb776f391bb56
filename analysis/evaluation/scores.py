"""Per-image scores of a run: how they are named, kept, and summarised in `results.csv`."""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from analysis.evaluation.bootstrap import Interval, Statistic, bootstrap, share_mean
from analysis.evaluation.metrics.depth_pairs import pair_accuracy
from analysis.evaluation.metrics.frechet import Jackknife
from analysis.evaluation.metrics.segmentation import mean_iou
from probing.models.finite import NotFinite
from probing.runs.directory import Run
from probing.utils.errors import UserError
from probing.utils.files import reading, whole_file, write_text

COLUMNS = (
    *("checkpoint", "teacher", "layer", "probe", "control", "metric", "protocol", "variant", "split", "seed"),
    *("value", "ci_low", "ci_high", "n", "chance"),
)
CHANCE = {"da2k": 0.5}
"""Metrics whose chance level is the same for any data."""
STATISTICS: dict[str, Statistic] = {
    "da2k": pair_accuracy,
    "miou": mean_iou,
    "word_miou": mean_iou,
    "lens_miou": mean_iou,
    "word_cosine": pair_accuracy,
    "word_retrieval": pair_accuracy,
    "lens_retrieval": pair_accuracy,
}
"""How a metric follows from sums over images; the mean for all others, and for the protocol `paper`."""
AGAIN = "remove it and evaluate again"
EMPTY = Interval(math.nan, math.nan, math.nan)
"""The interval over no image."""
AVERAGE = "mean"
"""What `results.csv` says in place of a layer for the mean over the probed layers 1 … L, as the paper's Table 8 has.
Imported probes' mean includes `final`; see `averages_final`."""


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
        """Name of its tensor in a file."""
        return "/".join(map(str, vars(self).values()))

    @classmethod
    def from_key(cls, key: str) -> "ScoreKey":
        """The inverse of `key`."""
        teacher, layer, probe, control, metric, protocol, variant, seed = key.split("/")
        return cls(teacher, layer, probe, control, metric, protocol, variant, int(seed))


Table = dict[ScoreKey, NDArray[Any]]
"""Per curve (images), or (images, …) where a metric needs more than one number of each image."""


@dataclass
class ScoreFile:
    """The scores of one metric.

    Attributes:
        table: the curves.
        names: the images, in the order of the rows.
        split: where the images come from.
        settings: what the scores depend on besides the run; curves of one file share it.
        sums: curves that are kept as one sum over all images.
        done: images gone through, readable or not; an unfinished pass goes on from there.
        skipped: image, split and reason of those that could not be read.
        not_finite: `layer NAME` or `teacher NAME` → rows of images left out there; their scores are NaN.
        chance: metric → its value by chance, where that follows from the data.
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

    @classmethod
    def read(cls, file: Path) -> "ScoreFile":
        """Reads what `write` wrote; raises UserError where that is not what the file holds."""
        with reading(file, AGAIN), safe_open(file, framework="np") as stored:
            rest = json.loads(stored.metadata()["pass"])
            tables: dict[str, Table] = {"image": {}, "sum": {}}
            for name in stored.keys():  # noqa: SIM118
                kind, _, key = name.partition(":")
                tables[kind][ScoreKey.from_key(key)] = stored.get_tensor(name)
            found = cls(table=tables["image"], sums=tables["sum"], **rest)
            if any(scores.shape[:1] != (len(found.names),) for scores in found.table.values()):
                raise ValueError("a curve has not as many scores as there are images")
        return found

    def write(self, file: Path) -> None:
        """Writes tensors `image:<curve>` and `sum:<curve>`; everything else goes to the metadata."""
        tensors = {f"image:{curve.key()}": np.ascontiguousarray(scores) for curve, scores in self.table.items()}
        tensors |= {f"sum:{curve.key()}": np.ascontiguousarray(total) for curve, total in self.sums.items()}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("table", "sums")}
        with whole_file(file) as temporary:
            save_file(tensors, temporary, {"pass": json.dumps(rest)})

    def merge(self, other: "ScoreFile") -> bool:
        """Takes over the curves of another file that were made of the same images with the same settings."""
        if (self.names, self.split, self.settings) != (other.names, other.split, other.settings):
            return False
        self.table, self.sums = other.table | self.table, other.sums | self.sums
        self.not_finite = other.not_finite | self.not_finite
        return True

    def left_out(self) -> NotFinite:
        """`not_finite` as masks over the images."""
        masks: NotFinite = {}
        for place, rows in self.not_finite.items():
            kind, _, name = place.partition(" ")
            masks[kind, name] = np.isin(np.arange(len(self.names)), rows)
        return masks


def read_if_fits(file: Path, settings: str) -> ScoreFile | None:
    """A score file, if it is there, whole, and made with these settings."""
    try:
        found = ScoreFile.read(file)
    except UserError:
        return None
    return found if found.settings == settings else None


def score_file(run: Path, stem: str, split: str) -> Path:
    """Where the scores of one metric lie, or what else a pass leaves behind."""
    return run / f"{stem}-{split}.safetensors"


@dataclass(frozen=True)
class Summary:
    """One row of `results.csv`.

    Attributes:
        curve: what it is about; the seed is overridden by `seed`.
        split: where the images come from.
        seed: a number, or `all`.
        interval: the value and its interval.
        n: number of images.
        chance: value by chance, where it is known.
        images: hash of their names, where there are no scores that name them.
        distances: what the interval of a Fréchet distance comes from.
    """

    curve: ScoreKey
    split: str
    seed: str
    interval: Interval
    n: int
    chance: float = math.nan
    images: str = ""
    distances: Jackknife | None = None


def write_summaries(file: Path, rows: Sequence[Summary]) -> None:
    """Keeps rows that are too dear to compute from scores again."""
    plain = []
    for row in rows:
        values = {**vars(row), "curve": row.curve.key(), "interval": vars(row.interval)}
        if row.distances is not None:
            values["distances"] = {name: array.tolist() for name, array in vars(row.distances).items()}
        plain.append(values)
    write_text(file, json.dumps(plain) + "\n")


def read_summaries(file: Path) -> list[Summary]:
    """The inverse of `write_summaries`; raises UserError where the file holds something else."""
    rows = []
    with reading(file, AGAIN):
        for row in json.loads(file.read_text(encoding="utf-8")):
            values = {**row, "curve": ScoreKey.from_key(row["curve"]), "interval": Interval(**row["interval"])}
            if row.get("distances"):
                values["distances"] = Jackknife(**{name: np.array(array) for name, array in row["distances"].items()})
            rows.append(Summary(**values))
    return rows


def by_seed(table: Table) -> dict[ScoreKey, dict[int, NDArray[Any]]]:
    """Groups curves that differ by nothing but their seed, in the order of `results.csv`."""
    grouped: dict[ScoreKey, dict[int, NDArray[Any]]] = {}
    for curve in sorted(table, key=_place):
        grouped.setdefault(ScoreKey(**{**vars(curve), "seed": 0}), {})[curve.seed] = table[curve]
    return grouped


def pooled(curve: ScoreKey, scores: dict[int, NDArray[Any]], seeds: Sequence[int]) -> dict[str, NDArray[Any]]:
    """What gets a row of its own: every seed of a trained probe, and all of them together; (seeds, images, …)."""
    trained = curve.probe == "resampler"
    stacks: dict[str, NDArray[Any]] = {str(seed): s[None] for seed, s in scores.items()} if trained else {}
    if len(seeds) > 1 or not trained:
        stacks["all" if len(seeds) > 1 else str(seeds[0])] = np.stack(list(scores.values()))
    return stacks


def _place(curve: ScoreKey) -> tuple[Any, ...]:
    """Sorts curves by metric and in the order of their layers, `final` last."""
    layer = float(curve.layer) if curve.layer.isdecimal() else math.inf
    return curve.metric, curve.protocol, curve.variant, curve.teacher, curve.probe, curve.control, layer, curve.seed


def is_averaged(layer: str, with_final: bool) -> bool:
    """Whether the mean over layers takes a layer: those after a decoder block, as in the paper, and perhaps `final`."""
    return (layer.isdecimal() and int(layer) > 0) or (with_final and layer == "final")


def averages_final(*manifests: dict[str, Any]) -> bool:
    """Whether `final` is among the layers that a mean is over, as the last layer of imported probes.

    The published probes of the last layer read the state after the final norm, and OLA-VLM averages over all of them.
    """
    return all(manifest.get("fit", {}).get("imported") for manifest in manifests)


def summaries(found: ScoreFile, seeds: Sequence[int], with_final: bool = False) -> Iterator[Summary]:
    """The rows of `results.csv` that come from one file of scores.

    Args:
        found: the scores.
        seeds: of the trained probes.
        with_final: whether the mean over layers takes `final` too; see `averages_final`.
    """
    families: dict[tuple[ScoreKey, str], list[NDArray[Any]]] = {}
    for curve, scores in by_seed(found.table).items():
        for seed, stack in pooled(curve, scores, seeds).items():
            yield Summary(curve, found.split, seed, *_interval(curve, [stack]), chance_of(curve.metric, found))
            if is_averaged(curve.layer, with_final):
                families.setdefault((replace(curve, layer=AVERAGE), seed), []).append(stack)
    for (curve, seed), stacks in families.items():
        yield Summary(curve, found.split, seed, *_interval(curve, stacks), chance_of(curve.metric, found))


def chance_of(metric: str, found: ScoreFile) -> float:
    """Value of a metric by chance; NaN where it is unknown."""
    return found.chance.get(metric, CHANCE.get(metric, math.nan))


def _interval(curve: ScoreKey, layers: Sequence[NDArray[Any]]) -> tuple[Interval, int]:
    """The interval over the images that count at every layer, and their number; `EMPTY` where there is none."""
    table, statistic = over_layers(curve, layers)
    table = table[:, finite_images(table)]
    return (bootstrap(table, statistic) if table.shape[1] else EMPTY), table.shape[1]


def finite_images(*tables: NDArray[Any]) -> NDArray[np.bool_]:
    """The images (n) whose scores are finite in all tables (seeds, n, …); the others were left out of some layer."""
    flags = (np.isfinite(table).reshape(*table.shape[:2], -1) for table in tables)
    return np.logical_and.reduce([flag.all(axis=(0, 2)) for flag in flags])


def over_layers(curve: ScoreKey, layers: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], Statistic]:
    """The mean over layers of a curve's metric, as one statistic.

    Args:
        curve: says which metric.
        layers: scores of each, (seeds, images) or (seeds, images, numbers).

    Returns:
        The layers' numbers side by side, (seeds, images, layers · numbers), and the statistic of their sums.
    """
    statistic = share_mean if curve.protocol == "paper" else STATISTICS.get(curve.metric, share_mean)
    tables = [layer[..., None] if layer.ndim == 2 else layer for layer in layers]

    def mean(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        return statistic(totals.reshape(*totals.shape[:-1], len(tables), -1)).mean(axis=-1)

    return np.concatenate(tables, axis=-1), mean


def write_results(run: Run) -> Path:
    """Writes `results.csv` from all scores of a run: one row per number, with its interval."""
    files = sorted((run.path / "scores").glob("*.safetensors"))
    seeds, with_final = run.recipe.fit.seeds, averages_final(run.manifest)
    rows = [row for file in files for row in summaries(ScoreFile.read(file), seeds, with_final)]
    rows += [row for file in sorted((run.path / "scores").glob("*.json")) for row in read_summaries(file)]
    return write_rows(run.path / "results.csv", run.manifest["checkpoint"]["name"], rows)


def write_rows(target: Path, checkpoint: str, rows: Iterable[Summary]) -> Path:
    """Writes a file of results; a number that does not exist is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        place = [checkpoint, *list(vars(row.curve).values())[:-1]]
        *numbers, chance = ["" if math.isnan(x) else f"{x:.8g}" for x in (*vars(row.interval).values(), row.chance)]
        writer.writerow([*place, row.split, row.seed, *numbers, row.n, chance])
    write_text(target, buffer.getvalue())
    return target
