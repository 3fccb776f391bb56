"""Paired differences between the answers of checkpoints to the same questions, resampled by image."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.benchmarks.accuracy import PartSums, ScoredAnswer
from analysis.benchmarks.tasks import BENCHMARKS, part_label, title
from analysis.evaluation.bootstrap import paired_bootstrap
from analysis.evaluation.compare import COLUMNS, Difference, describe_seeds, higher_in
from analysis.evaluation.registry import ACCURACY
from probing.recipe import read_yaml
from probing.runs.directory import is_benchmark, runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json, read_json_lines, reading

SHARED_FIELDS = ("suffix", "max_new_tokens")
"""Fields of the recipe that two runs must share."""


@dataclass(frozen=True)
class CheckpointAnswers:
    """The answers of one checkpoint to one benchmark, of each seed of its training."""

    path: Path
    benchmark: str
    digest: str
    settings: dict[str, Any]
    names: list[str]
    seeds: list[list[ScoredAnswer]]

    @classmethod
    def read(cls, path: Path) -> "CheckpointAnswers":
        """Reads a finished run, or a folder of runs whose checkpoints differ by their seed."""
        runs = runs_in(path) or [path]
        first, *others = [cls._read_run(run) for run in runs]
        for other in others:
            if other.benchmark != first.benchmark:
                raise UserError(f"{path} holds runs of several benchmarks; move each benchmark to its own folder")
            first.require_same_questions(other)
        seeds = [one.seeds[0] for one in (first, *others)]
        return replace(first, path=path, names=[run.name for run in runs], seeds=seeds)

    @classmethod
    def _read_run(cls, run: Path) -> "CheckpointAnswers":
        if not (run / "manifest.json").exists():
            raise UserError(f"{run} has not finished; run its probing bench again")
        if not (run / "recipe.yaml").exists():
            raise UserError(f"{run} has no recipe.yaml; {RESTORE_ADVICE}")
        if not is_benchmark(run):
            raise UserError(f"{run} is no run of probing bench; move other runs to another folder")
        recipe, manifest = read_yaml(run / "recipe.yaml"), read_json(run / "manifest.json", RESTORE_ADVICE)
        with reading(run / "answers.jsonl", RESTORE_ADVICE):
            answers = [ScoredAnswer(**line) for line in read_json_lines(run / "answers.jsonl")]
            if len(answers) != manifest["data"]["questions"]:
                raise ValueError(f"{len(answers)} answers to {manifest['data']['questions']} questions")
        settings = {field: recipe.get(field) for field in SHARED_FIELDS}
        return cls(run, manifest["benchmark"], manifest["data"]["digest"], settings, [run.name], [answers])

    def require_same_questions(self, other: "CheckpointAnswers") -> None:
        """Raises UserError if two checkpoints had different questions or prompts."""
        mine, theirs = ([(answer.question, answer.image) for answer in one.seeds[0]] for one in (self, other))
        prefix = f"{self.path} and {other.path} cannot be compared: they"
        if self.digest != other.digest or mine != theirs:
            raise UserError(f"{prefix} have different questions or images")
        for field, value in self.settings.items():
            if value != other.settings[field]:
                raise UserError(f"{prefix} differ in {field} ({value!r} and {other.settings[field]!r})")


def compare_answers(paths: Sequence[Path], labels: Sequence[str]) -> pd.DataFrame:
    """Compares every two runs of `probing bench` on the same benchmark, question by question.

    Args:
        paths: finished runs, or folders of runs whose checkpoints differ by their seed; the reference first. Runs of
            the same name in two folders are pairs.
        labels: a name for each.

    Returns:
        A row per pair and part of the benchmark, with the columns of `analysis.evaluation.compare.Difference`;
        `protocol` is the benchmark, `variant` its part, and `n` the number of questions.

    Raises:
        UserError: two runs of one benchmark have different questions or prompts, or a benchmark has one
            run only.
    """
    runs = [CheckpointAnswers.read(path) for path in paths]
    for run in runs:
        if [other.benchmark for other in runs].count(run.benchmark) == 1:
            raise UserError(
                f"{run.path} is the only run of {BENCHMARKS[run.benchmark].title}; give another, or omit it"
            )
    rows: list[Difference] = []
    for (one, reference), (two, label) in itertools.combinations(zip(runs, labels, strict=True), 2):
        if one.benchmark == two.benchmark:
            one.require_same_questions(two)
            rows += [replace(row, checkpoint=label, reference=reference) for row in _differences(one, two)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _differences(reference: CheckpointAnswers, checkpoint: CheckpointAnswers) -> Iterator[Difference]:
    """Yields a row per part, two minus one, labelled by their paths."""
    known, first = BENCHMARKS[checkpoint.benchmark], checkpoint.seeds[0]
    paired = len(checkpoint.seeds) > 1 and checkpoint.names == reference.names
    for part in known.parts([answer.groups for answer in first]):
        sums = PartSums.of(part, first)
        table, base = (
            np.stack([sums.table(np.array([answer.score for answer in answers])) for answers in one.seeds])
            for one in (checkpoint, reference)
        )
        values = [sums.statistic(one.mean(axis=1)) for one in (table, base)]
        interval = paired_bootstrap(table, base, sums.statistic, seeds_paired=paired)
        yield Difference(
            checkpoint=str(checkpoint.path), reference=str(reference.path), teacher="", layer="", probe="",
            metric=ACCURACY, protocol=known.name, variant=part.name, split=known.split,
            value=interval.value, ci_low=interval.low, ci_high=interval.high, n=sums.count,
            seeds=f"{len(table)}, {len(base)}",
            higher=f"{higher_in(*values)} of {len(table)}" if paired else "",
        )  # fmt: skip


def answer_statements(table: pd.DataFrame) -> list[str]:
    """One sentence per pair and benchmark on its overall accuracy, or on each half where there is none."""
    sentences = []
    for (checkpoint, reference, benchmark), part in table.groupby(["checkpoint", "reference", "protocol"], sort=False):
        depth = part["variant"].map(lambda variant: len(variant.split("/")) if variant else 0)
        for _, row in part[depth == depth.min()].iterrows():
            verdict = "no clear difference"
            if row["ci_low"] > 0 or row["ci_high"] < 0:
                verdict = f"{checkpoint} answers {'better' if row['value'] > 0 else 'worse'}"
            name, label = title(benchmark, {int(part["n"].max())}), part_label(row["variant"])
            sentences.append(
                f"{name}, {label}: accuracy of {checkpoint} - {reference} = {row['value']:+.4f} [{row['ci_low']:+.4f}, "
                f"{row['ci_high']:+.4f}] over the images of {row['n']} questions{describe_seeds(row)}: {verdict}"
            )
    return sentences
