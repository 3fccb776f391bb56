"""`probing train --dry-run`: what would be done, checked as far as it goes without weights, and nothing written."""

import os
from pathlib import Path

import torch

from analysis.alignment.run import AlignRecipe, _labelled, _require_free
from analysis.evaluation.run import Options
from analysis.evaluation.scores import score_file
from analysis.planning.distillation import stage_cost
from analysis.planning.evaluation import plan
from analysis.planning.probe_training import CostUnknown, Devices, training_cost
from probing.data.panoptic import Panoptic
from probing.distillation.recipe import DistillRecipe
from probing.distillation.setup import open_start
from probing.distillation.trainer import _is_finished, _last_state, _require_same
from probing.models import count_blocks, layer_name, parse_layers
from probing.recipe import LayersRecipe, ProbeRunRecipe
from probing.runs.directory import Run, members
from probing.training.run import ARMS, held_out_images, summary_file, training_images
from probing.training.schedule import count_steps
from probing.utils.distributed import started
from probing.utils.files import reading, require_space
from probing.utils.pretrained import locate


def rehearse_training(recipe: ProbeRunRecipe, out: Path) -> list[str]:
    """What `probing.training.run.train` would do, for people.

    Raises:
        UserError: as training would, but for faults in the weights.
    """
    train, held_out = training_images(recipe.data), held_out_images(recipe.data)
    layers = parse_layers(recipe.layers, count_blocks(recipe.backbone))
    try:
        cost = training_cost(recipe, started())
        disk, costs = cost.disk, cost.lines(Devices(started()))
    except CostUnknown as error:
        disk, costs = 0, [str(error)]
    begun = Run.is_begun(out, recipe)
    finished = (out / "manifest.json").exists()
    if not finished:
        require_space(out, disk)
    steps = count_steps(len(train), recipe.fit)
    arms = ARMS if "random" in recipe.controls else ARMS[:1]
    controls, seeds = ["mean target", *recipe.controls], recipe.fit.seeds
    there = "finished already; nothing would be done" if finished else "new"
    if begun and not finished:
        there = "begun; " + ", ".join(f"{arm_name(arm)}: {_progress(Run(out, recipe), arm, steps)}" for arm in arms)
    return [
        f"run: {out} ({there})",
        f"checkpoint: {recipe.backbone.checkpoint}, layers {', '.join(map(layer_name, layers))}",
        f"images: {len(train):,} of {train.split} to train on, {len(held_out):,} of {held_out.split} held out",
        f"teachers: {teacher_names(recipe)}",
        f"controls: {', '.join(controls)}; seeds: {', '.join(map(str, seeds))}",
        f"steps: {steps:,} of {recipe.fit.batch_size} images for {' and '.join(map(arm_name, arms))}",
        *costs,
    ]


def arm_name(arm: str) -> str:
    """What a set of backbone weights is called."""
    return "the checkpoint" if arm == ARMS[0] else "random weights"


def teacher_names(recipe: LayersRecipe) -> str:
    """Teachers with their sources; raises UserError where one is a folder that holds no model."""
    return ", ".join(f"{name} ({locate(one.id, f'{name} teacher')})" for name, one in recipe.teachers.items()) or "none"


def _progress(run: Run, arm: str, steps: int) -> str:
    if summary_file(run, arm).exists():
        return "trained"
    state = run.path / "state" / arm / "state.pt"
    if parts := list(state.parent.glob("state_*.pt")):  # of processes that share the layers
        return f"goes on after step {min(int(part.suffixes[0][1:]) for part in parts):,} of {steps:,}"
    if not state.exists():
        return "from the start"
    with reading(state, f"remove {state.parent} to train from the start"):
        done = int(torch.load(state, map_location="meta", weights_only=True, mmap=True)["step"])
    return f"goes on after step {done:,} of {steps:,}"


def rehearse_stage(recipe: DistillRecipe, out: Path) -> list[str]:
    """What `run_stage` would do, for people; writes nothing.

    Raises:
        UserError: as `run_stage`, but for faults in the weights and in the section `trainer`.
    """
    work = out.parent / f"{out.name}.training"
    if _is_finished(recipe, out):
        return [f"checkpoint: {out} (finished already; nothing would be done)"]
    saved, there = _last_state(work), "new"
    if saved:
        _require_same(recipe, work / "recipe.yaml")
        there = f"begun; goes on after step {int(saved.rsplit('-', 1)[1]):,}"
    start, processes = open_start(recipe), int(os.environ.get("WORLD_SIZE", "1"))
    cost = stage_cost(recipe, processes)
    require_space(out, cost.disk)
    taught = [part.teachers for part in (recipe.embedding, recipe.encoders) if part is not None]
    teachers = ", ".join(name for part in taught for name in part) or "none"
    return [
        f"checkpoint: {out} ({there}); while it is trained, states lie in {work}",
        f"starts from: {start.source}, stage {recipe.stage}",
        f"data: {len(start.conversations):,} conversations; teachers: {teachers}",
        f"steps: {cost.steps:,} of {cost.conversations} conversations",
        *cost.lines(Devices(processes)),
    ]


def rehearse_alignment(recipe: AlignRecipe, out: Path) -> list[str]:
    """What `align` would do, for people; writes nothing.

    Raises:
        UserError: as `align`, but for faults in the weights.
    """
    maps, images = _labelled(recipe)
    layers = parse_layers(recipe.layers, count_blocks(recipe.backbone))
    teachers = teacher_names(recipe)
    _require_free(out, recipe)
    files = {name: score_file(out, f"scores/{name}", images.split) for name in ("sample", "alignment")}
    states = {name: out / "state" / f"{name}.safetensors" for name in files}
    there = {
        name: "there already" if file.exists() else "begun, goes on" if states[name].exists() else "new"
        for name, file in files.items()
    }
    annotations = "panoptic" if isinstance(maps, Panoptic) else "instances"
    few = min(recipe.sample, len(images))
    return [
        f"run: {out}",
        f"checkpoint: {recipe.backbone.checkpoint}, layers {', '.join(map(layer_name, layers))}",
        f"images: {len(images):,} of {images.split} with masks ({annotations}, {len(maps.names)} classes)",
        f"teachers: {teachers}",
        f"pass over a sample: {few:,} images ({there['sample']})",
        f"pass over all: {len(images):,} images ({there['alignment']})",
        f"writes: {out / 'results.csv'}, scores per image, pictures of {min(recipe.pictures, len(images))}",
    ]


def rehearse_evaluation(path: Path, options: Options) -> list[str]:
    """What `analysis.evaluation.run.evaluate` would do with a run, or a folder of runs, for people; writes nothing.

    Raises:
        UserError: as evaluating would, but for faults in the weights.
    """
    lines = []
    for run in [Run.open(folder) for folder in members(path) or [path]]:
        costs = plan(run, run.recipe, options)
        locate(run.recipe.backbone.checkpoint, "checkpoint")
        lines += [f"run: {run.path}", f"teachers: {teacher_names(run.recipe)}"]
        lines += [f"{cost.metric}: {cost.work}; there already: {cost.there}" for cost in costs]
        unfinished = sorted((run.path / "state" / "evaluate").glob("*.safetensors"))
        lines += [f"unfinished, goes on where its settings are these: {file.stem}" for file in unfinished]
    return [*lines, f"writes: {path / 'results.csv'}, and scores per image beside it"]
