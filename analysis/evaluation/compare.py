"""`probing compare`: paired differences between checkpoints with the same probes, teachers and images."""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.evaluation.bootstrap import Interval, paired_bootstrap
from analysis.evaluation.jackknife import Jackknife
from analysis.evaluation.registry import describe
from analysis.evaluation.scores import (
    AVERAGE,
    EMPTY,
    ERASED,
    ScoreFile,
    ScoreKey,
    averages_final,
    by_seed,
    finite_images,
    is_averaged,
    over_layers,
)
from analysis.evaluation.seed_group import Scored, open_runs, read_distances, read_scores, require_alike, require_same
from probing.training.convergence import AT_THE_MEAN
from probing.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """One paired difference, checkpoint minus reference; columns as in `results.csv` but for these.

    Attributes:
        reference: what the checkpoint is compared with.
        layer: `mean` is over the layers 1 … L that both have; empty for answers to a benchmark.
        protocol: of answers the benchmark, whose part is the variant.
        n: number of images or questions that both were scored on.
        seeds: number of the checkpoint's seeds, and of the reference's.
        higher: in how many pairs of seeds the checkpoint is higher; empty if seeds are not paired.
    """

    checkpoint: str
    reference: str
    teacher: str
    layer: str
    probe: str
    metric: str
    protocol: str
    variant: str
    split: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    seeds: str
    higher: str


COLUMNS = [field.name for field in fields(Difference)]
DETAILS = ("cosine", "code_length_mean", "erased_loss", "erased_accuracy", "erased_rank")
"""Metrics that the command line leaves to the page: parts of others, or other versions of them."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, or several that differ by their seed."""

    label: str
    runs: Sequence[Scored]


def compare(paths: Sequence[Path], labels: Sequence[str]) -> pd.DataFrame:
    """Compares every run with every one before it, image by image.

    Args:
        paths: evaluated runs, or folders of runs whose checkpoints differ by their seed alone. Runs with the same name
            in two folders are paired.
        labels: a name for each.

    Returns:
        A row per difference, with the columns of `Difference`; those from the first run come first.

    Raises:
        UserError: the runs differ in data, teachers, probes or training, or have no score in common.
    """
    if len(paths) < 2:
        raise UserError("a comparison takes at least two runs; give the reference first")
    sides = [Side(label, open_runs(path)) for path, label in zip(paths, labels, strict=True)]
    for side in sides[1:]:
        require_alike(sides[0].runs[0], side.runs[0])
    for side in sides:
        _warn_of_probes_at_the_mean(side)
    rows: list[dict[str, Any]] = []
    for (first, reference), (second, side) in itertools.combinations(enumerate(sides), 2):
        found = [asdict(row) for row in _differences(side, reference)]
        if not found and first == 0:
            raise UserError(
                f"{paths[0]} and {paths[second]} have no score in common; evaluate both with the same metrics, "
                "protocols and images"
            )
        rows += found
    return pd.DataFrame(rows, columns=COLUMNS)


def _warn_of_probes_at_the_mean(side: Side) -> None:
    """Warns if resamplers predict little more than the mean target, so that nothing follows from their scores."""
    probes = [row for run in side.runs for row in run.manifest.get("convergence", []) if row["control"] == "none"]
    affected = [row for row in probes if row["state"] == AT_THE_MEAN]
    if affected:
        teachers = ", ".join(dict.fromkeys(row["teacher"] for row in affected))
        logger.warning(
            "%s: %d of %d resamplers (%s) learned little beyond the mean target; train longer",
            side.label, len(affected), len(probes), teachers,
        )  # fmt: skip


def _differences(side: Side, reference: Side) -> Iterator[Difference]:
    ours, theirs = read_scores(side.runs), read_scores(reference.runs)
    with_final = averages_final(*(run.manifest for run in (*side.runs, *reference.runs)))
    paired = len(side.runs) > 1 and [run.path.name for run in side.runs] == [run.path.name for run in reference.runs]

    def row(key: ScoreKey, split: str, interval: Interval, n: int, values: Sequence[NDArray[Any]]) -> Difference:
        """`values` has the value of every seed of both sides."""
        one, two = values
        place = (key.teacher, key.layer, key.probe, key.metric, key.protocol, key.variant, split)
        higher = f"{higher_in(one, two)} of {len(one)}" if paired and n else ""
        numbers = (interval.value, interval.low, interval.high, n)
        return Difference(side.label, reference.label, *place, *numbers, f"{len(one)}, {len(two)}", higher)

    for file in (file for file in theirs if file in ours):
        mine, others = ours[file].conditions, theirs[file].conditions
        for what in others | mine:
            advice = "; score both in the same way"
            require_same(reference.runs[0], side.runs[0], what, others.get(what), mine.get(what), advice)
        for key, pairs in _shared_series(ours[file], theirs[file], with_final).items():
            table, statistic = over_layers(key, [one for one, _ in pairs])
            base, _ = over_layers(key, [two for _, two in pairs])
            finite = finite_images(table, base)
            table, base, n = table[:, finite], base[:, finite], int(finite.sum())
            interval = paired_bootstrap(table, base, statistic, seeds_paired=paired) if n else EMPTY
            values = [statistic(x.mean(axis=1)) if n else np.empty(len(x)) for x in (table, base)]
            yield row(key, theirs[file].split, interval, n, values)

    own, distances = read_distances(side.runs), read_distances(reference.runs)
    for key in (key for key in distances if key in own and key.layer and key.control == "none"):
        one, two = own[key], distances[key]
        first = two[0]
        if any((x.n, x.images) != (first.n, first.images) or math.isnan(x.interval.value) for x in (*one, *two)):
            # One lacks images at this layer, and both jackknives must leave out the same images.
            yield row(key, first.split, EMPTY, 0, [np.empty(len(one)), np.empty(len(two))])
        elif first.jackknife is not None:
            ours_, theirs_ = (Jackknife.concatenate([x.jackknife for x in rows if x.jackknife]) for rows in (one, two))
            interval = ours_.interval_above(theirs_, seeds_paired=paired)
            yield row(key, first.split, interval, first.n, [ours_.whole, theirs_.whole])


def _shared_series(
    one: ScoreFile, two: ScoreFile, with_final: bool
) -> dict[ScoreKey, list[tuple[NDArray[Any], NDArray[Any]]]]:
    """Pairs scores (seeds, images, …) of the same images: of each layer, and of all layers for the mean over them."""
    places = [{name: row for row, name in enumerate(file.names)} for file in (one, two)]
    names = [name for name in two.names if name in places[0]]
    if one.split != two.split or len(names) < 2:
        return {}
    rows = [[place[name] for name in names] for place in places]
    series: dict[ScoreKey, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    tables = by_seed(one.table), by_seed(two.table)
    for key in tables[1]:
        if key not in tables[0] or not key.layer or key.control != "none":
            continue
        ours, theirs = (
            np.stack([values[chosen] for values in table[key].values()])
            for table, chosen in zip(tables, rows, strict=True)
        )
        series.setdefault(key, []).append((ours, theirs))
        if is_averaged(key.layer, with_final):
            series.setdefault(replace(key, layer=AVERAGE), []).append((ours, theirs))
    return series


def higher_in(values: NDArray[Any], others: NDArray[Any]) -> int:
    """Counts the pairs of seeds whose difference is above zero, by more than rounding."""
    return int((values - others > 1e-9).sum())


def describe_seeds(row: pd.Series) -> str:
    """Returns what a sentence on a difference adds about seeds; nothing if each side has one."""
    if row["higher"]:
        return f" and {row['seeds'].split(',')[0]} pairs of seeds (higher in {row['higher']})"
    return "" if row["seeds"] == "1, 1" else f" and {row['seeds'].replace(',', ' and')} seeds"


def _numbers(row: pd.Series) -> str:
    digits = describe(row["metric"], row["protocol"]).digits + 1
    value, low, high = (f"{row[name]:+.{digits}f}" for name in ("value", "ci_low", "ci_high"))
    pair = f"{row['checkpoint']} - {row['reference']}"
    return f"{pair} = {value} [{low}, {high}] over {row['n']} images{describe_seeds(row)}"


def _is_clear(rows: pd.DataFrame | pd.Series) -> Any:
    return (rows["ci_low"] > 0) | (rows["ci_high"] < 0)


def statements(table: pd.DataFrame, headlines: Iterable[tuple[str, str]] = ()) -> list[str]:
    """Describes the mean over layers in one sentence per checkpoint, teacher, probe, metric and variant.

    Without probes, each of `headlines` (metric and variant) gets one, after the projector and over the layers.
    Differences over no image share one that names their layers.
    """
    empty = table[(table["n"] == 0) & (table["layer"] != AVERAGE)]
    table = table[table["n"] > 0]
    sentences = []
    unprobed = table[(table["probe"] == "") & table["layer"].isin(["0", AVERAGE])]
    for metric, variant in headlines:
        for _, row in unprobed[(unprobed["metric"] == metric) & (unprobed["variant"] == variant)].iterrows():
            where = "mean over layers" if row["layer"] == AVERAGE else f"layer {row['layer']}"
            verdict = "no clear difference" if not _is_clear(row) else "higher" if row["value"] > 0 else "lower"
            name = f"{metric} ({variant})" if variant else metric
            sentences.append(f"{name}, {where}: {_numbers(row)}: {verdict}")
    keys = ["checkpoint", "reference", "teacher", "probe", "metric", "protocol", "variant"]
    for key, part in table[table["probe"] != ""].groupby(keys, sort=False):
        checkpoint, _, teacher, probe, metric, protocol, variant = key
        mean, layers = part[part["layer"] == AVERAGE], part[part["layer"] != AVERAGE]
        if mean.empty:
            continue
        row = mean.iloc[0]
        info = describe(metric, protocol)
        better = (row["value"] > 0) == info.higher_is_better
        verdict = f"{checkpoint} reads {'better' if better else 'worse'}"
        if probe == ERASED:
            verdict = f"{checkpoint} is {'higher' if row['value'] > 0 else 'lower'}"
        if not _is_clear(row):
            verdict = "no clear difference"
        name = f"{info.label}, {variant}" if variant else info.label
        above, below = int((layers["ci_low"] > 0).sum()), int((layers["ci_high"] < 0).sum())
        sentences.append(
            f"{teacher}, {probe}, {name}, mean over layers: {_numbers(row)}: {verdict}; "
            f"of {len(layers)} layers {above} clearly higher, {below} clearly lower"
        )
    for (checkpoint, reference), part in empty.groupby(["checkpoint", "reference"], sort=False):
        layers = ", ".join(dict.fromkeys(part["layer"]))
        sentences.append(
            f"{checkpoint} - {reference}: no image has finite numbers of both, or sets of images differ, at some of: "
            f"layers {layers}"
        )
    return sentences
