"""Paired differences between the answers of checkpoints to the same questions, resampled image by image."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.benchmarks.accuracy import (
    Answered,
    images_of,
    masks_and_weights,
    parts,
    read_answers,
    sums_by_image,
    weighted_mean,
)
from analysis.benchmarks.tasks import BENCHMARKS, part_label, title
from analysis.evaluation.bootstrap import paired_bootstrap
from analysis.evaluation.compare import COLUMNS, Difference, higher_in, seeds_told
from analysis.evaluation.registry import ACCURACY
from probing.recipe import read_yaml
from probing.runs.directory import is_benchmark, members
from probing.utils.errors import UserError
from probing.utils.files import LOST, read_json, reading

ASKED = ("suffix", "max_new_tokens")
"""Fields of the recipe that two runs must share."""


@dataclass(frozen=True)
class _Arm:
    """The answers of one checkpoint to one benchmark; several seeds of its training, where a folder has them."""

    path: Path
    benchmark: str
    digest: str
    asked: dict[str, Any]
    names: list[str]
    seeds: list[list[Answered]]


def compare_answers(paths: Sequence[Path], labels: Sequence[str]) -> pd.DataFrame:
    """Compares every two runs of `probing bench` on the same benchmark, question by question.

    Args:
        paths: finished runs, or folders of runs whose checkpoints differ by their seed alone; the reference first.
            Runs of the same name in two folders are taken as pairs.
        labels: a name for each.

    Returns:
        A row per pair and part of the benchmark, with the columns of `analysis.evaluation.compare.Difference`;
        `protocol` is the benchmark, `variant` its part, and `n` the number of questions.

    Raises:
        UserError: two runs of one benchmark were not asked the same questions in the same way, or a benchmark has one
            run alone.
    """
    arms = [_read(path) for path in paths]
    benchmarks = [arm.benchmark for arm in arms]
    for arm in arms:
        if benchmarks.count(arm.benchmark) == 1:
            name = BENCHMARKS[arm.benchmark].title
            raise UserError(f"{arm.path} is the only run of {name}; give another checkpoint's, or leave it out")
    rows: list[dict[str, Any]] = []
    for (one, reference), (two, label) in itertools.combinations(zip(arms, labels, strict=True), 2):
        if one.benchmark == two.benchmark:
            _require_alike(one, two)
            rows += [asdict(row) for row in _differences(one, two, reference, label)]
    return pd.DataFrame(rows, columns=COLUMNS)


def answer_statements(table: pd.DataFrame) -> list[str]:
    """One sentence per pair and benchmark, of its overall accuracy, or of each of its halves where there is none."""
    sentences = []
    for (checkpoint, reference, benchmark), part in table.groupby(["checkpoint", "reference", "protocol"], sort=False):
        depth = part["variant"].str.split("/").map(lambda names: len([name for name in names if name]))
        for _, row in part[depth == depth.min()].iterrows():
            verdict = "no clear difference"
            if row["ci_low"] > 0 or row["ci_high"] < 0:
                verdict = f"{checkpoint} answers {'better' if row['value'] > 0 else 'worse'}"
            name, where = title(benchmark, {int(part["n"].max())}), part_label(row["variant"])
            sentences.append(
                f"{name}, {where}: accuracy of {checkpoint} - {reference} = {row['value']:+.4f} [{row['ci_low']:+.4f}, "
                f"{row['ci_high']:+.4f}] over the images of {row['n']} questions{seeds_told(row)}: {verdict}"
            )
    return sentences


def _read(path: Path) -> _Arm:
    runs = members(path) or [path]
    found = [_read_one(run) for run in runs]
    for other in found[1:]:
        if other.benchmark != found[0].benchmark:
            raise UserError(f"{path} holds runs of several benchmarks; keep those of each in a folder of its own")
        _require_alike(found[0], other)
    return replace(found[0], path=path, names=[run.name for run in runs], seeds=[one.seeds[0] for one in found])


def _read_one(run: Path) -> _Arm:
    if not (run / "manifest.json").exists():
        raise UserError(f"{run} has not finished; type the probing bench that began it once more")
    if not (run / "recipe.yaml").exists():
        raise UserError(f"{run} has no recipe.yaml; {LOST}")
    if not is_benchmark(run):
        raise UserError(f"{run} is no run of probing bench; keep runs of different kinds in folders of their own")
    recipe, manifest = read_yaml(run / "recipe.yaml"), read_json(run / "manifest.json", LOST)
    file = run / "answers.jsonl"
    with reading(run / "manifest.json", LOST):
        benchmark, digest = manifest["benchmark"], manifest["data"]["digest"]
        questions = manifest["data"]["questions"]
    with reading(file, LOST):
        answered = read_answers(file)
        if len(answered) != questions:
            raise ValueError(f"{len(answered)} answers to {questions} questions")
    return _Arm(run, benchmark, digest, {field: recipe.get(field) for field in ASKED}, [run.name], [answered])


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


def _differences(reference: _Arm, arm: _Arm, reference_label: str, label: str) -> Iterator[Difference]:
    first = arm.seeds[0]
    images = images_of(first)
    paired = len(arm.seeds) > 1 and arm.names == reference.names
    for part, cells in parts(arm.benchmark, first):
        masks, weights = masks_and_weights(cells, first)
        table, base = (
            np.stack([sums_by_image(np.array([a.score for a in answered]), masks, images) for answered in one.seeds])
            for one in (arm, reference)
        )
        statistic = weighted_mean(weights)
        interval = paired_bootstrap(table, base, statistic, seeds_paired=paired)
        yield Difference(
            label, reference_label, "", "", "", ACCURACY, arm.benchmark, part, BENCHMARKS[arm.benchmark].split,
            interval.value, interval.low, interval.high, int(masks.any(axis=0).sum()), f"{len(table)}, {len(base)}",
            f"{higher_in(table, base, statistic)} of {len(table)}" if paired else "",
        )  # fmt: skip
