"""The results of some layers and teachers of a run, as `probing pull` takes them."""

import shutil
from pathlib import Path

from analysis.evaluation.scores import ScoreFile, ScoreKey, read_summaries, write_summaries
from probing.hub.sanitize import CARD
from probing.hub.subset import Part, copy_rows

OF_NO_LAYER = ""
"""What stands in place of a layer for the mean target and the teacher's own feature."""


def copy_results(run: Path, folder: Path, part: Part) -> None:
    """Copies `results.csv`, scores, and with a whole run its card.

    Means over layers are those of the whole run, and stay out of a part.

    Args:
        run: folder of the published run.
        folder: to fill.
        part: what of it is taken.

    Raises:
        UserError: a file cannot be read.
    """
    files = [file for pattern in ("*.safetensors", "*.json") for file in sorted((run / "scores").glob(pattern))]
    if files:
        (folder / "scores").mkdir()
    if part.whole:
        for file in [*files, run / "results.csv", run / CARD[0]]:
            if file.is_file():
                shutil.copyfile(file, folder / file.relative_to(run))
        if (run / CARD[1]).is_dir():
            shutil.copytree(run / CARD[1], folder / CARD[1])
        return
    layers = (*part.layers, OF_NO_LAYER)
    copy_rows(run / "results.csv", folder / "results.csv", part.teachers, layers)

    def taken(curve: ScoreKey) -> bool:
        return curve.teacher in part.teachers and curve.layer in layers

    for file in files:
        if file.suffix == ".json":
            rows = [row for row in read_summaries(file) if taken(row.curve)]
            if rows:
                write_summaries(folder / "scores" / file.name, rows)
            continue
        found = ScoreFile.read(file)
        found.table = {curve: scores for curve, scores in found.table.items() if taken(curve)}
        found.sums = {curve: total for curve, total in found.sums.items() if taken(curve)}
        if found.table or found.sums:
            found.write(folder / "scores" / file.name)
