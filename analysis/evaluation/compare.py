"""`probing compare`: paired differences between checkpoints that were probed alike."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.evaluation.bootstrap import Statistic, paired_bootstrap
from analysis.evaluation.metrics.frechet import Jackknife, is_distance
from analysis.evaluation.scores import (
    AVERAGE,
    EMPTY,
    ScoreKey,
    averages_final,
    by_seed,
    finite_images,
    is_averaged,
    over_layers,
)
from analysis.evaluation.seed_group import Scored, open_runs, read_distances, read_scores, require_alike
from probing.utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """One paired difference, checkpoint minus reference.

    Attributes:
        checkpoint: whose score is higher where the value is positive.
        reference: what it is compared with.
        teacher: which teacher; empty where there is none.
        layer: a layer, or `mean` for the mean over the layers 1 … L that both have; empty for answers to a benchmark.
        probe: `resampler` or `ridge`; empty where nothing was trained.
        metric: which metric.
        protocol: `strict` or `paper`; of answers the benchmark.
        variant: of the metric; of answers the part of the benchmark.
        split: where the images come from.
        value: the difference.
        ci_low: lower end of its 95 % interval.
        ci_high: upper end.
        n: images that both were scored on, or questions that both were asked.
        seeds: number of the checkpoint's seeds, and of the reference's.
        higher: at how many of the pairs of seeds the checkpoint is higher; empty where seeds are no pairs.
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


def compare(paths: Sequence[Path], labels: Sequence[str]) -> pd.DataFrame:
    """Compares every run with every one before it, image by image.

    Args:
        paths: evaluated runs, or folders of runs whose checkpoints differ by their seed alone. Runs of the same name in
            two folders are taken as pairs.
        labels: a name for each.

    Returns:
        A row per difference, with the columns of `Difference`; those from the first run come first.

    Raises:
        UserError: the runs differ in data, teachers, probes or training, or have no score in common.
    """
    if len(paths) < 2:
        raise UserError("a comparison takes at least two runs; give the reference first")
    arms = [open_runs(path) for path in paths]
    for runs in arms[1:]:
        require_alike(arms[0][0], runs[0])
    rows: list[dict[str, Any]] = []
    for one, two in itertools.combinations(range(len(paths)), 2):
        found = [asdict(row) for row in _differences(arms[one], arms[two], labels[one], labels[two])]
        if not found and one == 0:
            raise UserError(
                f"{paths[0]} and {paths[two]} have no score in common; evaluate both with the same metrics, protocols "
                "and images"
            )
        rows += found
    return pd.DataFrame(rows, columns=COLUMNS)


def _differences(
    reference: Sequence[Scored], runs: Sequence[Scored], reference_label: str, label: str
) -> Iterator[Difference]:
    theirs, ours = read_scores(reference), read_scores(runs)
    with_final = averages_final(*(run.manifest for run in (*reference, *runs)))
    paired = len(runs) > 1 and [run.path.name for run in runs] == [run.path.name for run in reference]
    for file in (file for file in theirs if file in ours):
        one, two = theirs[file], ours[file]
        names = [name for name in one.names if name in set(two.names)]
        if one.split != two.split or len(names) < 2:
            continue
        one_rows, two_rows = ([f.names.index(name) for name in names] for f in (one, two))
        families: dict[ScoreKey, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        mine, others = by_seed(one.table), by_seed(two.table)
        for curve in mine:
            if curve not in others or not curve.layer or curve.control != "none":
                continue
            pair = (
                np.stack([scores[one_rows] for scores in mine[curve].values()]),
                np.stack([scores[two_rows] for scores in others[curve].values()]),
            )
            families.setdefault(curve, []).append(pair)
            if is_averaged(curve.layer, with_final):
                families.setdefault(replace(curve, layer=AVERAGE), []).append(pair)
        for curve, pairs in families.items():
            table, statistic = over_layers(curve, [two for _, two in pairs])
            base = over_layers(curve, [one for one, _ in pairs])[0]
            both = finite_images(table, base)
            table, base, number = table[:, both], base[:, both], int(both.sum())
            interval = paired_bootstrap(table, base, statistic, seeds_paired=paired) if number else EMPTY
            place = (curve.teacher, curve.layer, curve.probe, curve.metric, curve.protocol, curve.variant, one.split)
            numbers = (interval.value, interval.low, interval.high, number)
            seeds = f"{len(table)}, {len(base)}"
            higher = f"{higher_in(table, base, statistic)} of {len(table)}" if paired and number else ""
            yield Difference(label, reference_label, *place, *numbers, seeds, higher)
    yield from _distances(reference, runs, reference_label, label, paired)


def _distances(
    reference: Sequence[Scored], runs: Sequence[Scored], reference_label: str, label: str, paired: bool
) -> Iterator[Difference]:
    """Differences of Fréchet distances: both jackknives leave out the same images."""
    theirs, ours = read_distances(reference), read_distances(runs)
    for curve in (curve for curve in theirs if curve in ours and curve.layer and curve.control == "none"):
        one, two = theirs[curve], ours[curve]
        place = (curve.teacher, curve.layer, curve.probe, curve.metric, curve.protocol, curve.variant, one[0].split)
        if any(row.n != one[0].n or math.isnan(row.interval.value) for row in (*one, *two)):
            # One lacks images at this layer, and a jackknife leaves out the same images of both or tells nothing.
            seeds = f"{len(two)}, {len(one)}"
            numbers = (EMPTY.value, EMPTY.low, EMPTY.high, 0)
            yield Difference(label, reference_label, *place, *numbers, seeds, "")
            continue
        if one[0].distances is None or one[0].images != two[0].images:
            continue
        base, own = (Jackknife.of_seeds([row.distances for row in rows if row.distances]) for rows in (one, two))
        interval = own.interval_above(base, seeds_paired=paired)
        numbers = (interval.value, interval.low, interval.high, one[0].n)
        higher = f"{int((own.whole > base.whole).sum())} of {len(own.whole)}" if paired else ""
        yield Difference(label, reference_label, *place, *numbers, f"{len(own.whole)}, {len(base.whole)}", higher)


def higher_in(table: NDArray[Any], others: NDArray[Any], statistic: Statistic) -> int:
    """At how many pairs of seeds the difference is above zero, by more than rounding."""
    return int((statistic(table.mean(axis=1)) - statistic(others.mean(axis=1)) > 1e-9).sum())


def seeds_told(row: pd.Series) -> str:
    """What a sentence on a difference adds on seeds; nothing where each has one."""
    if row["higher"]:
        return f" and {row['seeds'].split(',')[0]} pairs of seeds (higher in {row['higher']})"
    return "" if row["seeds"] == "1, 1" else f" and {row['seeds'].replace(',', ' and')} seeds"


def _told(row: pd.Series) -> str:
    """One difference where nothing was trained, so that neither sign is better."""
    where = "mean over layers" if row["layer"] == AVERAGE else f"layer {row['layer']}"
    variant = f" ({row['variant']})" if row["variant"] else ""
    verdict = "higher" if row["ci_low"] > 0 else "lower" if row["ci_high"] < 0 else "no clear difference"
    return (
        f"{row['metric']}{variant}, {where}: {row['checkpoint']} - {row['reference']} = {row['value']:+.4f} "
        f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}] over {row['n']} images{seeds_told(row)}: {verdict}"
    )


def statements(table: pd.DataFrame, headlines: Iterable[tuple[str, str]] = ()) -> list[str]:
    """One sentence per checkpoint, teacher, probe and metric: the mean over layers, and at how many it is clear.

    What has no probes gets one for each of `headlines` (metric and variant), after the projector and over the layers.
    Differences over no image get none but a sentence that names their layers.
    """
    empty = table[(table["n"] == 0) & (table["layer"] != AVERAGE)]
    table = table[table["n"] > 0]
    told = table[(table["probe"] == "") & table["layer"].isin(["0", AVERAGE])]
    sentences = [
        _told(row)
        for metric, variant in headlines
        for _, row in told[(told["metric"] == metric) & (told["variant"] == variant)].iterrows()
    ]
    table = table[table["probe"] != ""]
    keys = ["checkpoint", "reference", "teacher", "probe", "metric", "protocol"]
    for key, part in table.groupby(keys, sort=False):
        checkpoint, reference, teacher, probe, metric, protocol = key
        mean = part[part["layer"] == AVERAGE]
        layers = part[part["layer"] != AVERAGE]
        above, below = int((layers["ci_low"] > 0).sum()), int((layers["ci_high"] < 0).sum())
        better = "lower" if is_distance(metric) else "higher"
        if mean.empty:
            continue
        row = mean.iloc[0]
        verdict = "no clear difference"
        if row["ci_low"] > 0 or row["ci_high"] < 0:
            verdict = f"{checkpoint} reads {'better' if (row['value'] > 0) == (better == 'higher') else 'worse'}"
        sentences.append(
            f"{teacher}, {probe}, {metric} ({protocol}): {checkpoint} - {reference} = {row['value']:+.4f} "
            f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}] over {row['n']} images{seeds_told(row)}: {verdict}; of "
            f"{len(layers)} layers {above} clearly higher, {below} clearly lower"
        )
    for (checkpoint, reference), part in empty.groupby(["checkpoint", "reference"], sort=False):
        layers = ", ".join(dict.fromkeys(part["layer"]))
        sentences.append(f"{checkpoint} - {reference}: no image has finite numbers of both at some of: layers {layers}")
    return sentences
