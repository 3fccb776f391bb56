"""`probing train --dry-run`: what would be done, checked as far as it goes without weights, and nothing written."""

from pathlib import Path

import torch

from probing.backbones import count_blocks, layer_name, parse_layers
from probing.cost import CostUnknown, Devices, training_cost
from probing.hub import locate
from probing.processes import started
from probing.recipe import LayersRecipe, ProbeRunRecipe
from probing.run import Run, reading, require_space
from probing.schedule import count_steps
from probing.train import ARMS, held_out_images, summary_file, training_images


def rehearse_training(recipe: ProbeRunRecipe, out: Path) -> list[str]:
    """What `probing.train.train` would do, for people.

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
