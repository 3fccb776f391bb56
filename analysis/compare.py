"""`probing compare`: paired differences between checkpoints that were probed alike."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.scores import AVERAGE, Curve, ScoreFile, by_seed, is_block, over_layers
from analysis.statistics import paired_bootstrap
from probing.errors import UserError
from probing.run import SPEED_ONLY, Run


@dataclass(frozen=True)
class Difference:
    """One paired difference, checkpoint minus reference.

    Attributes:
        checkpoint: whose score is higher where the value is positive.
        reference: what it is compared with.
        teacher: which teacher.
        layer: a layer, or `mean` for the mean over the layers 1 … L that both have.
        probe: `resampler` or `ridge`.
        metric: which metric.
        protocol: how it is computed.
        split: where the images come from.
        value: the difference.
        ci_low: lower end of its 95 % interval.
        ci_high: upper end.
        n: images that both were scored on.
        seeds: seeds of the checkpoint's probes, and of the reference's.
    """

    checkpoint: str
    reference: str
    teacher: str
    layer: str
    probe: str
    metric: str
    protocol: str
    split: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    seeds: str


COLUMNS = [field.name for field in fields(Difference)]


def compare(paths: Sequence[Path], labels: Sequence[str]) -> pd.DataFrame:
    """Compares every run with the first one, image by image.

    Args:
        paths: evaluated runs; the first is the reference.
        labels: a name for each.

    Returns:
        A row per difference, with the columns of `Difference`.

    Raises:
        UserError: the runs differ in data, teachers, probes or training, or have no score in common.
    """
    runs = [Run.open(path) for path in paths]
    if len(runs) < 2:
        raise UserError("a comparison takes at least two runs; give the reference first")
    for run in runs[1:]:
        _require_alike(runs[0], run)
    rows = [
        asdict(row)
        for run, label in zip(runs[1:], labels[1:], strict=True)
        for row in _differences(runs[0], run, labels[0], label)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _require_alike(one: Run, two: Run) -> None:
    """Raises UserError naming the first thing in which two runs differ and must not."""
    a, b = one.manifest, two.manifest
    names = sorted(set(a["teachers"]) | set(b["teachers"]))
    pairs: list[tuple[str, Any, Any]] = [
        ("number of layers", a["checkpoint"]["layers"], b["checkpoint"]["layers"]),
        ("teachers", sorted(a["teachers"]), sorted(b["teachers"])),
        *((f"{n} teacher", *(m["teachers"].get(n, {}).get("sha256") for m in (a, b))) for n in names),
        *((what, a["data"][what], b["data"][what]) for what in ("train_split", "eval_split", "view")),
        ("training images", a["data"]["train_digest"], b["data"]["train_digest"]),
        ("held-out images", a["data"]["eval_digest"], b["data"]["eval_digest"]),
        ("prompt", a["prompt"], b["prompt"]),
    ]
    for section in ("probe", "fit"):
        mine, others = (getattr(run.recipe, section).model_dump() for run in (one, two))
        skipped = {"seeds", *(name.removeprefix("fit.") for name in SPEED_ONLY)}
        pairs += [(f"{section}.{key}", mine[key], others[key]) for key in mine if key not in skipped]
    for what, mine, others in pairs:
        if mine != others:
            shown = "" if any(len(str(v)) > 60 for v in (mine, others)) else f" ({mine} and {others})"
            raise UserError(f"{one.path} and {two.path} cannot be compared: they differ in {what}{shown}")


def _differences(reference: Run, run: Run, reference_label: str, label: str) -> Iterator[Difference]:
    found = False
    for file in sorted((reference.path / "scores").glob("*.safetensors")):
        other = run.path / "scores" / file.name
        if not other.exists():
            continue
        one, two = ScoreFile.read(file), ScoreFile.read(other)
        names = [name for name in one.names if name in set(two.names)]
        if one.split != two.split or len(names) < 2:
            continue
        one_rows, two_rows = ([f.names.index(name) for name in names] for f in (one, two))
        families: dict[Curve, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        mine, others = by_seed(one.table), by_seed(two.table)
        for curve in mine:
            if curve not in others or not curve.layer or curve.control != "no":
                continue
            found = True
            pair = (
                np.stack([scores[one_rows] for scores in mine[curve].values()]),
                np.stack([scores[two_rows] for scores in others[curve].values()]),
            )
            families.setdefault(curve, []).append(pair)
            if is_block(curve.layer):
                families.setdefault(replace(curve, layer=AVERAGE), []).append(pair)
        for curve, pairs in families.items():
            table, statistic = over_layers(curve, [two for _, two in pairs])
            interval = paired_bootstrap(table, over_layers(curve, [one for one, _ in pairs])[0], statistic)
            place = (curve.teacher, curve.layer, curve.probe, curve.metric, curve.protocol, one.split)
            numbers = (interval.value, interval.low, interval.high, len(names))
            seeds = f"{len(pairs[0][1])}, {len(pairs[0][0])}"
            yield Difference(label, reference_label, *place, *numbers, seeds)
    if not found:
        raise UserError(
            f"{reference.path} and {run.path} have no score in common; evaluate both with the same metrics, protocols "
            "and images"
        )


def statements(table: pd.DataFrame) -> list[str]:
    """One sentence per checkpoint, teacher, probe and metric: the mean over layers, and at how many it is clear."""
    sentences = []
    keys = ["checkpoint", "reference", "teacher", "probe", "metric", "protocol"]
    for key, part in table.groupby(keys, sort=False):
        checkpoint, reference, teacher, probe, metric, protocol = key
        mean = part[part["layer"] == AVERAGE]
        layers = part[part["layer"] != AVERAGE]
        above, below = int((layers["ci_low"] > 0).sum()), int((layers["ci_high"] < 0).sum())
        if mean.empty:
            continue
        row = mean.iloc[0]
        verdict = (
            f"{checkpoint} reads better"
            if row["ci_low"] > 0
            else f"{checkpoint} reads worse"
            if row["ci_high"] < 0
            else "no clear difference"
        )
        sentences.append(
            f"{teacher}, {probe}, {metric} ({protocol}): {checkpoint} - {reference} = {row['value']:+.4f} "
            f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}] over {row['n']} images: {verdict}; of {len(layers)} layers "
            f"{above} clearly higher, {below} clearly lower"
        )
    return sentences
