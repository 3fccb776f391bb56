"""Paired differences between the answers of checkpoints to the same questions, resampled image by image."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.accuracies import (
    Answered,
    images_of,
    masks_and_weights,
    parts,
    read_answers,
    sums_by_image,
    weighted_mean,
)
from analysis.compare import COLUMNS, Difference
from analysis.metrics import ACCURACY
from analysis.statistics import paired_bootstrap
from probing.data.benchmarks import BENCHMARKS
from probing.errors import UserError
from probing.recipe import read_yaml
from probing.run import LOST, members, read_json, reading

ASKED = ("suffix", "max_new_tokens")
"""Fields of the recipe on which answers depend besides the checkpoint."""


@dataclass(frozen=True)
class _Arm:
    """The answers of one checkpoint to one benchmark; several seeds of its training, where a folder has them."""

    path: Path
    label: str
    benchmark: str
    digest: str
    asked: dict[str, Any]
    names: list[str]
    seeds: list[list[Answered]]


def compare_answers(paths: Sequence[Path]) -> pd.DataFrame:
    """Compares every two runs of `probing bench` on the same benchmark, question by question.

    Args:
        paths: finished runs, or folders of runs whose checkpoints differ by their seed alone; the reference first.

    Returns:
        A row per pair and part of the benchmark, with the columns of `analysis.compare.Difference`; `protocol` is the
        part, and `n` its number of questions.

    Raises:
        UserError: two runs of one benchmark were not asked the same questions in the same way, or no benchmark has two.
    """
    arms = [_read(path) for path in paths]
    rows: list[dict[str, Any]] = []
    for one, two in itertools.combinations(arms, 2):
        if one.benchmark == two.benchmark:
            _require_alike(one, two)
            rows += [asdict(row) for row in _differences(one, two, _labels(arms))]
    if not rows:
        raise UserError("no benchmark was asked of two checkpoints; give at least two runs of the same one")
    return pd.DataFrame(rows, columns=COLUMNS)


def answer_statements(table: pd.DataFrame) -> list[str]:
    """One sentence per pair and benchmark, of its overall accuracy, or of each of its halves where there is none."""
    sentences = []
    for (checkpoint, reference, benchmark), part in table.groupby(
        ["checkpoint", "reference", table["protocol"].str.split("/").str[0]], sort=False
    ):
        depth = part["protocol"].str.count("/")
        for _, row in part[depth == depth.min()].iterrows():
            verdict = "no clear difference"
            if row["ci_low"] > 0 or row["ci_high"] < 0:
                verdict = f"{checkpoint} answers {'better' if row['value'] > 0 else 'worse'}"
            seeds = f", higher at {row['higher']} seeds" if row["higher"] else ""
            name = " ".join([BENCHMARKS[benchmark].title, *row["protocol"].split("/")[1:]])
            sentences.append(
                f"{name}, accuracy: {checkpoint} - {reference} = {row['value']:+.4f} [{row['ci_low']:+.4f}, "
                f"{row['ci_high']:+.4f}] over {row['n']} questions{seeds}: {verdict}"
            )
    return sentences


def _read(path: Path) -> _Arm:
    runs = members(path) or [path]
    found = [_read_one(run) for run in runs]
    for other in found[1:]:
        if other.benchmark != found[0].benchmark:
            raise UserError(f"{path} holds runs of several benchmarks; give each of its runs, or keep them apart")
        _require_alike(found[0], other)
    seeds = [answered for one in found for answered in one.seeds]
    label = path.resolve().name if members(path) else found[0].label
    return _Arm(path, label, found[0].benchmark, found[0].digest, found[0].asked, [run.name for run in runs], seeds)


def _read_one(run: Path) -> _Arm:
    manifest, recipe, file = (
        read_json(run / "manifest.json", LOST),
        read_yaml(run / "recipe.yaml"),
        run / "answers.jsonl",
    )
    with reading(file, LOST):
        answered = read_answers(file)
        if len(answered) != manifest["data"]["questions"]:
            raise ValueError(f"{len(answered)} answers to {manifest['data']['questions']} questions")
    asked = {field: recipe.get(field) for field in ASKED}
    name, digest = manifest["checkpoint"]["name"], manifest["data"]["digest"]
    return _Arm(run, name, manifest["benchmark"], digest, asked, [run.name], [answered])


def _labels(arms: Sequence[_Arm]) -> dict[Path, str]:
    """A name for each, with its folder where two of one benchmark would be called alike."""
    names = [(arm.benchmark, arm.label) for arm in arms]
    return {
        arm.path: f"{arm.label} ({arm.path})" if names.count(name) > 1 else arm.label
        for arm, name in zip(arms, names, strict=True)
    }


def _require_alike(one: _Arm, two: _Arm) -> None:
    about = [[(answer.question, answer.image) for answer in arm.seeds[0]] for arm in (one, two)]
    if one.digest != two.digest or about[0] != about[1]:
        raise UserError(
            f"{one.path} and {two.path} cannot be compared: they were not asked the same questions about the same "
            "images"
        )
    for field in ASKED:
        if one.asked[field] != two.asked[field]:
            raise UserError(
                f"{one.path} and {two.path} cannot be compared: they differ in {field} ({one.asked[field]!r} and "
                f"{two.asked[field]!r})"
            )


def _differences(reference: _Arm, arm: _Arm, labels: dict[Path, str]) -> Iterator[Difference]:
    first = arm.seeds[0]
    images = images_of(first)
    paired = len(arm.seeds) > 1 and arm.names == reference.names
    for protocol, cells in parts(arm.benchmark, first):
        masks, weights = masks_and_weights(cells, first)
        tables = [
            np.stack([sums_by_image(np.array([a.score for a in answered]), masks, images) for answered in one.seeds])
            for one in (arm, reference)
        ]
        statistic = weighted_mean(weights)
        interval = paired_bootstrap(*tables, statistic, seeds_paired=paired)
        own, base = (statistic(table.mean(axis=1)) for table in tables)
        yield Difference(
            labels[arm.path], labels[reference.path], "", "", "", ACCURACY, protocol, BENCHMARKS[arm.benchmark].split,
            interval.value, interval.low, interval.high, int(masks.any(axis=0).sum()),
            f"{len(own)}, {len(base)}", f"{int((own > base).sum())} of {len(own)}" if paired else "",
        )  # fmt: skip
