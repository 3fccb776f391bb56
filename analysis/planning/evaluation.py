"""`probing evaluate --dry-run`, and `probing plan` of a run: what scoring takes, and what of it exists."""

from dataclasses import replace
from pathlib import Path

import torch

from analysis.evaluation.forward_pass import PASSES, Selection
from analysis.evaluation.generated_images.features import reference_file
from analysis.evaluation.generated_images.generation import feature_folder
from analysis.evaluation.metrics.fid import GeneratedImages
from analysis.evaluation.options import Options
from analysis.evaluation.registry import metrics
from analysis.evaluation.run import require_protocols, selection
from analysis.evaluation.scores import score_file
from analysis.evaluation.seed_group import open_runs
from analysis.planning.plan import Plan
from probing.data.coco import ImageList
from probing.models import count_blocks
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run, runs_in
from probing.training.run import held_out_images
from probing.utils.pretrained import locate


def plan_evaluation(path: Path, options: Options) -> Plan:
    """Says what evaluating a run, or a folder of runs, does; loads nothing but networks for image features.

    Raises:
        UserError: as evaluating, except for faults in the weights.
    """
    facts = {}
    runs = open_runs(path) if runs_in(path) else [Run.open(path)]
    for run in (run for run in runs if isinstance(run, Run)):
        which = f" of {run.path.name}" if len(runs) > 1 else ""
        locate(run.recipe.backbone.checkpoint, "checkpoint")
        teachers = {name: locate(one.id, f"{name} teacher") for name, one in run.recipe.teachers.items()}
        facts[f"run{which}"] = str(run.path)
        facts[f"teachers{which}"] = ", ".join(f"{name} ({source})" for name, source in teachers.items())
        facts |= {f"{subject}{which}": text for subject, text in plan_metrics(run.recipe, options, run).facts.items()}
        if unfinished := sorted((run.path / "state" / "evaluate").glob("*.safetensors")):
            facts[f"resumes{which}"] = ", ".join(file.stem for file in unfinished) + ", if the settings are the same"
    return Plan(facts | {"writes": f"{path / 'results.csv'}, and scores per image next to it"})


def plan_metrics(recipe: ProbeRunRecipe, options: Options, run: Run | None = None) -> Plan:
    """Says what each metric takes.

    Args:
        recipe: of the run.
        options: as for `analysis.evaluation.run.evaluate`.
        run: a finished run; None where only the recipe exists.

    Raises:
        UserError: something that was requested does not exist.
    """
    blocks = run.manifest["checkpoint"]["layers"] if run else count_blocks(recipe.backbone)
    images = held_out_images(recipe.data)
    require_protocols(options)
    facts: dict[str, str] = {}
    for metric in options.metrics:
        chosen = selection(recipe, blocks, options, metric)
        kind = metrics()[metric]
        if issubclass(kind, GeneratedImages):
            facts |= _generation(run, recipe, kind, chosen, images, options)
            continue
        if kind.recorded:
            facts[metric] = "recorded in training; no forward pass"
            continue
        count, split = kind.count_images(options, images)
        work = f"{count:,} images x {sum(bool(chosen.in_pass(one).controls) for one in PASSES)} forward passes"
        if kind.teacher:
            curves, protocols = len(_curves(chosen, recipe)), len(kind.select_protocols(options.protocols))
            decodings = f"{count * curves * protocols:,} decodings"
            work += f"; {count:,} x {curves} curves x {protocols} protocols = {decodings}"
        file = score_file(run.path, f"scores/{metric}", split) if run else None
        facts[metric] = (
            f"{work}; exists: {f'{file}, if the settings are the same' if file and file.exists() else 'nothing'}"
        )
    return Plan(facts)


def _generation(
    run: Run | None,
    recipe: ProbeRunRecipe,
    kind: type[GeneratedImages],
    chosen: Selection,
    images: ImageList,
    options: Options,
) -> dict[str, str]:
    """Counts images that the diffusion model generates, and the features of real ones."""
    kind.require_options(options)
    metric, images = kind.name, replace(images, names=images.names[: options.images])
    curves = [*_curves(chosen, recipe), "constant-mean", "target-teacher"]
    generated, calls = len(curves) * len(images), options.steps * (2 if options.guidance > 1 else 1)
    work = (
        f"{len(curves)} sets x {len(images):,} images = {generated:,} images x {calls} calls of the diffusion model = "
        f"{generated * calls:,} calls"
    )
    if kind.downloads(options):
        return {metric: f"{work}; exists: nothing", f"{metric}, real images": "features; downloads the network"}
    extractor = kind.load_extractor(options, torch.device("cpu"))
    exists = 0
    if run is not None:
        teacher = run.manifest["teachers"]["gen"]["sha256"]
        folder = feature_folder(run.path, extractor, teacher, options.steps, options.guidance)
        exists = sum(any(folder.glob(f"{curve}-*.safetensors")) for curve in curves)
    real = reference_file(extractor, images)
    return {
        metric: f"{work}; exists: {f'{exists} of {len(curves)} sets' if exists else 'nothing'}",
        f"{metric}, real images": f"features of {len(images):,} images; exists: {real if real.exists() else 'nothing'}",
    }


def _curves(chosen: Selection, recipe: ProbeRunRecipe) -> list[str]:
    """Returns the prefix of each curve's file of generated images."""
    keys = (key for layer in chosen.layers for key in chosen.keys(layer, "", recipe.fit.seeds))
    return [f"{key.layer}-{key.probe}-{key.control}-{key.seed}" for key in keys]
