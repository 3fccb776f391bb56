"""A folder of runs whose checkpoints differ by their training seed alone, read as one run with several seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.evaluation.bootstrap import Interval
from analysis.evaluation.jackknife import Jackknife
from analysis.evaluation.scores import (
    ScoreFile,
    ScoreKey,
    Summary,
    averages_final,
    by_seed,
    read_summaries,
    summaries,
    write_rows,
)
from probing.runs.directory import SPEED_ONLY, FinishedAlignment, Run, is_alignment, runs_in
from probing.utils.errors import UserError

Scored = Run | FinishedAlignment


def require_alike(one: Scored, two: Scored) -> None:
    """Raises UserError naming the first difference that rules out a comparison of two runs."""
    if type(one) is not type(two):
        raise UserError(f"{one.path} and {two.path} cannot be compared: only one is of probing align")
    for (what, mine), (_, others) in zip(_conditions(one, two), _conditions(two, one), strict=True):
        require_same(one, two, what, mine, others)


def require_same(one: Scored, two: Scored, what: str, mine: Any, others: Any, advice: str = "") -> None:
    """Raises UserError if a condition of the first run is another in the second."""
    if mine != others:
        shown = "" if any(len(str(v)) > 60 for v in (mine, others)) else f" ({mine} and {others})"
        raise UserError(f"{one.path} and {two.path} cannot be compared: they differ in {what}{shown}{advice}")


def _conditions(run: Scored, other: Scored) -> Iterator[tuple[str, Any]]:
    """Yields what must be the same in both runs, by name."""
    manifest, data = run.manifest, run.manifest["data"]
    yield "number of layers", manifest["checkpoint"]["layers"]
    yield "teachers", sorted(manifest["teachers"])
    for name in sorted({*manifest["teachers"], *other.manifest["teachers"]}):
        teacher = manifest["teachers"].get(name, {})
        yield f"{name} teacher", teacher.get("sha256")
        yield f"{name} teacher's target", teacher.get("shape")
    yield "eval_split", data["eval_split"]
    yield "held-out images", data["eval_digest"]
    yield "prompt", manifest["prompt"]
    if isinstance(run, FinishedAlignment):
        yield from ((what, data[what]) for what in ("annotations", "classes"))
        yield from run.settings.items()
        return
    yield from ((what, data[what]) for what in ("train_split", "view"))
    yield "training images", data["train_digest"]
    free = {"seeds", *(name.removeprefix("fit.") for name in SPEED_ONLY)}
    for section in ("probe", "fit"):
        values = getattr(run.recipe, section).model_dump()
        yield from ((f"{section}.{key}", value) for key, value in values.items() if key not in free)


def open_runs(path: Path) -> Sequence[Scored]:
    """Opens a run, or the runs of a folder in the order of their names.

    Raises:
        UserError: no run exists, one is unfinished, or those of a folder differ in more than the checkpoint or have
            several probe seeds, which would be mixed with those of the checkpoints.
    """
    folders = runs_in(path) or [path]
    runs = [FinishedAlignment(folder) if is_alignment(folder) else Run.open(folder) for folder in folders]
    for run in runs[1:]:
        require_alike(runs[0], run)
    for run in runs if len(runs) > 1 else []:
        if isinstance(run, Run) and (number := len(run.recipe.fit.seeds)) > 1:
            raise UserError(f"{run.path} has {number} seeds of its probes; runs in a folder must have one each")
    return runs


def read_scores(runs: Sequence[Scored]) -> dict[str, ScoreFile]:
    """Reads the scores of one run, or those of several as one, with the number of the run as seed.

    Args:
        runs: of one folder, from `open_runs`.

    Returns:
        By name of a file that all runs have: the scores of the images that all have.

    Raises:
        UserError: runs were scored with different settings.
    """
    files = [{file.name: ScoreFile.read(file) for file in _files(run, "safetensors")} for run in runs]
    if len(runs) == 1:
        return files[0]
    shared = sorted(set.intersection(*map(set, files)))
    return {name: _merged(runs, [own[name] for own in files]) for name in shared}


def _files(run: Scored, kind: str) -> list[Path]:
    return sorted((run.path / "scores").glob(f"*.{kind}"))


def _merged(runs: Sequence[Scored], files: Sequence[ScoreFile]) -> ScoreFile:
    first = files[0]
    for run, file in zip(runs, files, strict=True):
        if (file.settings, file.split) != (first.settings, first.split):
            raise UserError(f"{runs[0].path} and {run.path} were scored differently; evaluate their folder")
    row_of = [{name: row for row, name in enumerate(file.names)} for file in files]
    names = [name for name in first.names if all(name in own for own in row_of)]
    shared = set.intersection(*({replace(key, seed=0) for key in file.table} for file in files))
    table = {}
    for number, (file, own) in enumerate(zip(files, row_of, strict=True)):
        rows = [own[name] for name in names]
        for key, seeds in by_seed(file.table).items():
            for index, values in enumerate(seeds.values() if key in shared else ()):
                table[replace(key, seed=number + index * len(files))] = values[rows]
    return ScoreFile(table, names, first.split, first.settings, chance=first.chance, conditions=first.conditions)


def write_pooled(folder: Path, runs: Sequence[Scored]) -> Path:
    """Writes `results.csv` of a folder of runs: every seed, and all of them together."""
    with_final = averages_final(*(run.manifest for run in runs))
    rows = [row for file in read_scores(runs).values() for row in summaries(file, range(len(runs)), with_final)]
    for several in read_distances(runs).values():
        rows += [replace(row, seed=str(number)) for number, row in enumerate(several)]
        rows.append(replace(several[0], seed="all", interval=_over_seeds(several)))
    return write_rows(folder / "results.csv", folder.resolve().name, rows)


def read_distances(runs: Sequence[Scored]) -> dict[ScoreKey, list[Summary]]:
    """Reads every run's distances between sets of the same images; of several probe seeds, the row of all."""
    tables: list[dict[ScoreKey, Summary]] = []
    for run in runs:
        tables.append({})
        for row in (row for file in _files(run, "json") for row in read_summaries(file)):
            key = replace(row.key, seed=0)
            if row.seed == "all" or key not in tables[-1]:
                tables[-1][key] = row
    return {
        key: [table[key] for table in tables]
        for key, row in tables[0].items()
        if all(key in table and table[key].images == row.images for table in tables)
    }


def _over_seeds(rows: Sequence[Summary]) -> Interval:
    """Returns mean and interval over images and seeds; of a kernel distance the mean spread of its subsets."""
    jackknives = [row.jackknife for row in rows if row.jackknife is not None]
    if len(jackknives) == len(rows):
        return Jackknife.concatenate(jackknives).interval()
    return Interval(*np.mean([list(vars(row.interval).values()) for row in rows], axis=0).tolist())
