"""A folder of runs whose checkpoints differ by the seed of their training alone, read as one run of many seeds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.evaluation.bootstrap import Interval
from analysis.evaluation.metrics.frechet import Jackknife
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
from probing.runs.directory import SPEED_ONLY, AlignmentRun, Run, is_alignment, members
from probing.utils.errors import UserError

Scored = Run | AlignmentRun


def require_alike(one: Scored, two: Scored) -> None:
    """Raises UserError naming the first thing in which two runs differ and must not."""
    if type(one) is not type(two):
        raise UserError(f"{one.path} and {two.path} cannot be compared: one has probes, the other is of probing align")
    a, b = one.manifest, two.manifest
    names = sorted(set(a["teachers"]) | set(b["teachers"]))
    pairs: list[tuple[str, Any, Any]] = [
        ("number of layers", a["checkpoint"]["layers"], b["checkpoint"]["layers"]),
        ("teachers", sorted(a["teachers"]), sorted(b["teachers"])),
        *((f"{n} teacher", *(m["teachers"].get(n, {}).get("sha256") for m in (a, b))) for n in names),
        *((f"{n} teacher's target", *(m["teachers"].get(n, {}).get("shape") for m in (a, b))) for n in names),
        ("eval_split", a["data"]["eval_split"], b["data"]["eval_split"]),
        ("held-out images", a["data"]["eval_digest"], b["data"]["eval_digest"]),
        ("prompt", a["prompt"], b["prompt"]),
    ]
    if isinstance(one, Run) and isinstance(two, Run):
        pairs += [(what, a["data"][what], b["data"][what]) for what in ("train_split", "view")]
        pairs += [("training images", a["data"]["train_digest"], b["data"]["train_digest"])]
        for section in ("probe", "fit"):
            mine, others = (getattr(run.recipe, section).model_dump() for run in (one, two))
            skipped = {"seeds", *(name.removeprefix("fit.") for name in SPEED_ONLY)}
            pairs += [(f"{section}.{key}", mine[key], others[key]) for key in mine if key not in skipped]
    elif isinstance(one, AlignmentRun) and isinstance(two, AlignmentRun):
        pairs += [(what, a["data"][what], b["data"][what]) for what in ("annotations", "classes")]
        pairs += [(key, one.settings[key], two.settings[key]) for key in one.settings]
    for what, mine, others in pairs:
        if mine != others:
            shown = "" if any(len(str(v)) > 60 for v in (mine, others)) else f" ({mine} and {others})"
            raise UserError(f"{one.path} and {two.path} cannot be compared: they differ in {what}{shown}")


def open_runs(path: Path) -> Sequence[Scored]:
    """A run, or the runs of a folder of them, in the order of their names.

    Raises:
        UserError: there is none, one is unfinished, or those of a folder differ in more than the checkpoint, or have
            more than one seed of the probes: seeds within seeds are not told apart.
    """
    runs = [_open(member) for member in members(path) or [path]]
    for run in runs[1:]:
        require_alike(runs[0], run)
    for run in runs if len(runs) > 1 else []:
        if isinstance(run, Run) and len(run.recipe.fit.seeds) > 1:
            raise UserError(
                f"{run.path} has {len(run.recipe.fit.seeds)} seeds of its probes; runs that are read as the seeds of "
                "one checkpoint must have one each"
            )
    return runs


def _open(path: Path) -> Scored:
    return AlignmentRun(path) if is_alignment(path) else Run.open(path)


def read_scores(runs: Sequence[Scored]) -> dict[str, ScoreFile]:
    """The scores of one run as they are, and of several as one: the seed of a curve is then the number of its run.

    Args:
        runs: of one folder, from `open_runs`.

    Returns:
        Per name of a file that all runs have: the scores of the images that all have.

    Raises:
        UserError: runs were scored with different settings.
    """
    found = [{file.name: ScoreFile.read(file) for file in _files(run, "safetensors")} for run in runs]
    if len(runs) == 1:
        return found[0]
    shared = set.intersection(*(set(files) for files in found))
    return {name: _merged(runs, [files[name] for files in found]) for name in sorted(shared)}


def _files(run: Scored, kind: str) -> list[Path]:
    return sorted((run.path / "scores").glob(f"*.{kind}"))


def _merged(runs: Sequence[Scored], files: Sequence[ScoreFile]) -> ScoreFile:
    first = files[0]
    for run, file in zip(runs[1:], files[1:], strict=True):
        if (file.settings, file.split) != (first.settings, first.split):
            raise UserError(
                f"{runs[0].path} and {run.path} were scored with different settings or images; evaluate their folder"
            )
    names = [name for name in first.names if all(name in set(file.names) for file in files)]
    there = set.intersection(*({replace(curve, seed=0) for curve in file.table} for file in files))
    table = {}
    for number, file in enumerate(files):
        place = {name: row for row, name in enumerate(file.names)}
        rows = [place[name] for name in names]
        for curve, several in by_seed(file.table).items():
            for place_of_seed, scores in enumerate(several.values() if curve in there else ()):
                table[replace(curve, seed=number + place_of_seed * len(files))] = scores[rows]
    return ScoreFile(table, names, first.split, first.settings)


def write_pooled(folder: Path, runs: Sequence[Scored]) -> Path:
    """Writes `results.csv` of a folder of runs: every seed, and all of them together."""
    with_final = averages_final(*(run.manifest for run in runs))
    rows = [row for file in read_scores(runs).values() for row in summaries(file, range(len(runs)), with_final)]
    for several in read_distances(runs).values():
        rows += [replace(row, seed=str(number)) for number, row in enumerate(several)]
        rows.append(replace(several[0], seed="all", interval=_over_seeds(several)))
    return write_rows(folder / "results.csv", folder.resolve().name, rows)


def read_distances(runs: Sequence[Scored]) -> dict[ScoreKey, list[Summary]]:
    """Distances between sets of images, by curve, of every run; curves that a run lacks are left out.

    Of a run with several seeds of its probes it is the row of all of them.
    """
    found: list[dict[ScoreKey, Summary]] = []
    for run in runs:
        found.append({})
        for row in (row for file in _files(run, "json") for row in read_summaries(file)):
            curve = replace(row.curve, seed=0)
            if row.seed == "all" or curve not in found[-1]:
                found[-1][curve] = row
    return {
        curve: [one[curve] for one in found]
        for curve, row in found[0].items()
        if all(curve in one and one[curve].images == row.images for one in found)
    }


def _over_seeds(rows: Sequence[Summary]) -> Interval:
    """Mean and interval over images and seeds; of a kernel distance the mean spread of its sub-samples."""
    distances = [row.distances for row in rows if row.distances is not None]
    if len(distances) == len(rows):
        return Jackknife.of_seeds(distances).interval()
    value, low, high = (
        float(np.mean([getattr(row.interval, name) for row in rows])) for name in ("value", "low", "high")
    )
    return Interval(value, low, high)
