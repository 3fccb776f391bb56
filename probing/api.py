"""The public interface for notebooks: what the command line does, one function per verb."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel

from probing.models import Backbone, load_backbone
from probing.recipe import (
    AssembleRecipe,
    BackboneRecipe,
    ProbeRunRecipe,
    TeacherRecipe,
    model_name,
    read_yaml,
    set_field,
    validate,
)
from probing.runs import directory
from probing.runs.directory import is_alignment, is_benchmark
from probing.teachers import Teacher
from probing.teachers import load_teacher as load_teacher_recipe
from probing.teachers.registry import CATALOGUE
from probing.utils.distributed import default_device
from probing.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

R = TypeVar("R", bound=BaseModel)


class Run(directory.Run):
    """A run with trained probes, from `train` or `open_run`."""

    def plot(self, metric: str = "cosine_centred", protocol: str = "strict", paper: bool = False) -> "Figure":
        """Draws a metric by layer; see `plot`."""
        return plot(self, metric=metric, protocol=protocol, paper=paper)


RunLike = directory.Run | Path | str


def load_model(checkpoint: Path | str, **fields: Any) -> Backbone:
    """Loads a checkpoint on the available device.

    Args:
        checkpoint: folder or Hub id.
        fields: of `BackboneRecipe`, e.g. `dtype="bfloat16"`.

    Raises:
        UserError: the checkpoint does not exist, is of an unknown family, or is incomplete.
    """
    recipe = _recipe(BackboneRecipe, {"checkpoint": str(checkpoint)}, fields)
    return load_backbone(recipe, default_device())


def load_teacher(name_or_id: str, **fields: Any) -> Teacher:
    """Loads a teacher on the available device.

    Args:
        name_or_id: `depth`, `seg` or `gen`; or the folder or Hub id of any vision encoder.
        fields: of `TeacherRecipe`, e.g. `grid=16`, or `id=FOLDER` for other weights of depth, seg or gen.

    Raises:
        UserError: the teacher does not exist, is of another class, or is incomplete.
    """
    known = CATALOGUE.get(name_or_id)
    name = name_or_id if known else re.sub(r"[^a-z0-9_-]", "-", model_name(name_or_id).rsplit("/", 1)[-1].lower())
    recipe = _recipe(TeacherRecipe, {"id": known.default_id if known else name_or_id}, fields)
    return load_teacher_recipe(name, recipe, default_device())


def assemble(llm: str, vision_tower: str, out: Path | str, **fields: Any) -> Path:
    """Makes a LLaVA folder of an LLM, a vision tower and a fresh projector; returns it.

    Args:
        llm: folder or Hub id of a decoder-only LLM.
        vision_tower: folder or Hub id, `hf-hub:ID`, or `open_clip:NAME/TAG`.
        out: folder of the new checkpoint.
        fields: of `AssembleRecipe`, e.g. `projector="linear"` or `image_size=768`.

    Raises:
        UserError: a part cannot be used or does not fit the others, or `out` is not empty.
    """
    from probing.models.assemble import assemble as assemble_parts

    return assemble_parts(_recipe(AssembleRecipe, {"llm": llm, "vision_tower": vision_tower}, fields), Path(out))


def train(recipe: ProbeRunRecipe | Mapping[str, Any] | Path | str, out: Path | str, **overrides: Any) -> Run:
    """Trains the probes of a run; an unfinished run resumes.

    Args:
        recipe: a recipe, its plain values, or a YAML file.
        out: folder of the run.
        overrides: fields of the recipe, with `__` between sections, e.g. `fit__epochs=3`.

    Raises:
        UserError: recipe, checkpoint, teachers or data cannot be used, or `out` holds another run.
    """
    from probing.training.run import train as train_run

    run = train_run(_recipe(ProbeRunRecipe, recipe, overrides).with_absolute_paths(), Path(out))
    return Run(run.path, run.recipe)


def open_run(path: Path | str) -> Run:
    """Opens a finished run; raises UserError if there is none."""
    return Run.open(Path(path))


def plot(*runs: RunLike, metric: str = "cosine_centred", protocol: str = "strict", paper: bool = False) -> "Figure":
    """Draws a metric by layer: colours for checkpoints, dashes for controls, bands for 95 % intervals.

    Args:
        runs: evaluated runs, or folders of runs that differ by their seed; their order sets the colours.
        metric: as in `results.csv`.
        protocol: likewise.
        paper: whether to use the widths and letters of a paper.

    Returns:
        A figure of matplotlib, to restyle or save; `figure.axes` has a panel per teacher and probe.

    Raises:
        UserError: a run has no results, or none has the metric.
    """
    from reports.figures import layer_plot
    from reports.results import load_runs

    return layer_plot(load_runs([_path(run) for run in runs]), metric, protocol, paper=paper)


def evaluate(run: RunLike, **options: Any) -> pd.DataFrame:
    """Scores a run's probes on held-out images; returns results.csv.

    Args:
        run: a finished run, or a folder of runs that differ by their seed.
        options: fields of `analysis.evaluation.options.Options`, e.g. `metrics=["cosine", "miou"]`.

    Raises:
        UserError: the run is unfinished, its inputs have changed, or a metric lacks something.
    """
    from analysis.evaluation.options import Options
    from analysis.evaluation.run import evaluate as evaluate_run
    from reports.results import read_results

    return read_results(evaluate_run(_path(run), _recipe(Options, {}, options)))


def erase(run: RunLike, **options: Any) -> pd.DataFrame:
    """Erases what is readable of the teachers' features and measures the loss of answers; returns results.csv.

    Args:
        run: a finished run, or a folder of runs that differ by their seed.
        options: fields of `analysis.erasure.options.Options`, e.g. `positions=["image"]`.

    Raises:
        UserError: the run is unfinished, its inputs have changed, or answers or a head are missing.
    """
    from analysis.erasure.options import Options
    from analysis.erasure.run import erase as erase_run
    from reports.results import read_results

    return read_results(erase_run(_path(run), _recipe(Options, {}, options)))


def compare(*runs: RunLike) -> pd.DataFrame:
    """Computes paired differences between runs; returns differences.csv.

    Args:
        runs: evaluated runs, runs of `align` or of `bench`, or folders of runs that differ by their seed; the reference
            comes first.

    Raises:
        UserError: the runs differ in more than the checkpoint, or share no score.
    """
    return pd.concat(paired_differences([_path(run) for run in runs]), ignore_index=True)


def paired_differences(runs: Sequence[Path]) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Computes differences of probes or alignment, and of benchmark answers; either is None without such runs."""
    from analysis.benchmarks.compare import compare_answers
    from analysis.evaluation.compare import compare as compare_runs
    from reports.alignment import load_alignments
    from reports.benchmarks import load_benchmarks, run_labels
    from reports.results import load_runs

    answered = [run for run in runs if is_benchmark(run)]
    others = [run for run in runs if run not in answered]
    if len(others) == 1 and answered:
        raise UserError(f"{others[0]} is the only run with probes; add another, or leave it out")
    load_benchmarks(answered)  # reports missing results before the work begins
    differences = answers = None
    if answered:
        answers = compare_answers(answered, run_labels(answered))
    if others or not answered:
        labelled = load_alignments(others) if others and is_alignment(others[0]) else load_runs(others)
        differences = compare_runs(others, [run.label for run in labelled])
    return differences, answers


def align(checkpoint: Path | str, data: str, out: Path | str, **fields: Any) -> pd.DataFrame:
    """Measures projector compression and patch-word alignment; returns results.csv.

    Args:
        checkpoint: folder or Hub id.
        data: `coco:DIR`, with masks.
        out: folder of the run; an unfinished one resumes.
        fields: of `analysis.alignment.recipe.AlignRecipe`, with `__` between sections, e.g. `layers="0,16"`.

    Raises:
        UserError: checkpoint, teachers, data or annotations cannot be used, or `out` holds another run.
    """
    from analysis.alignment.recipe import AlignRecipe
    from analysis.alignment.run import align as align_checkpoint
    from reports.results import read_results

    values = {"backbone": {"checkpoint": str(checkpoint)}, "data": {"path": data}}
    return read_results(align_checkpoint(_recipe(AlignRecipe, values, fields).with_absolute_paths(), Path(out)))


def bench(checkpoint: Path | str, benchmark: str, data: Path | str, out: Path | str, **fields: Any) -> pd.DataFrame:
    """Answers a VQA benchmark; returns results.csv with accuracies.

    Args:
        checkpoint: folder or Hub id.
        benchmark: `cvbench`, `mmstar`, `realworldqa` or `okvqa`.
        data: folder of its published files, or one of them.
        out: folder of the run; an unfinished one resumes.
        fields: of `analysis.benchmarks.recipe.BenchRecipe`, e.g. `micro_batch=32`.

    Raises:
        UserError: checkpoint or data cannot be used, or `out` holds another run.
    """
    from analysis.benchmarks.recipe import BenchRecipe
    from analysis.benchmarks.run import bench as run_benchmark
    from reports.results import read_results

    values = {"backbone": {"checkpoint": str(checkpoint)}, "benchmark": benchmark, "data": str(data)}
    return read_results(run_benchmark(_recipe(BenchRecipe, values, fields).with_absolute_paths(), Path(out)))


def report(*runs: RunLike, out: Path | str | None = None, style: Literal["screen", "paper"] | None = None) -> Path:
    """Writes the HTML report of runs; returns the page's path.

    Args:
        runs: evaluated runs, runs of `align` or of `bench`; their order sets the checkpoints' colours.
        out: folder of the report; by default `report/` in the first run.
        style: also write figures as files, of the style `screen` or `paper`.

    Raises:
        UserError: a folder is no run or has no results.
    """
    from reports.page import write_report

    paths = [_path(run) for run in runs]
    return write_report(paths, Path(out) if out else paths[0] / "report", style=style)


def _path(run: RunLike) -> Path:
    return run.path if isinstance(run, directory.Run) else Path(run)


def _recipe(model: type[R], recipe: R | Mapping[str, Any] | Path | str, fields: Mapping[str, Any]) -> R:
    """Builds a recipe from an object, plain values or a file, and fields with `__` between sections."""
    if isinstance(recipe, BaseModel):
        values = recipe.model_dump()
    elif isinstance(recipe, Mapping):
        values = copy.deepcopy(dict(recipe))
    else:
        values = read_yaml(Path(recipe))
    for name, value in fields.items():
        set_field(values, name.replace("__", "."), value)
    return validate(model, values, model.__name__)
