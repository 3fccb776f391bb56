"""`probing train --dry-run`, and `probing plan` of a recipe of probes."""

from pathlib import Path

import torch

from analysis.planning.model_cost import (
    META,
    UnknownCostError,
    decoder_flops,
    image_cost,
    resampler_flops,
    trace,
    weight_bytes,
    widest,
)
from analysis.planning.plan import Part, Plan, Work
from probing.data.coco import ImageList, first_image
from probing.models import FINAL, Backbone, check_models, layer_name, load_backbone, parse_layers
from probing.probes.bank import probe_configs
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run
from probing.runs.resume import holds_run
from probing.teachers import Teacher, load_teachers
from probing.training.buffer import plan_window
from probing.training.run import WEIGHTS, held_out_images, require_tokens, summary_file, training_images
from probing.training.schedule import count_steps, require_enough
from probing.training.sizes import disk_bytes, probe_parameters, ridge_bytes
from probing.training.trackers import require_tracker
from probing.utils.files import reading, require_space

TITLES = {"none": "pretrained weights", "random": "random weights"}


def plan_training(recipe: ProbeRunRecipe, out: Path | None = None, processes: int = 1) -> Plan:
    """Checks a recipe as training does, without weights, and says what training does and takes; writes nothing.

    Args:
        recipe: the run. Quantised weights are counted as if they were not.
        out: its directory.
        processes: that share the images.

    Raises:
        UserError: as training, except for faults in the weights.
    """
    require_tracker(recipe.fit.report_to)
    layers = check_models(recipe.backbone, recipe.teachers, recipe.layers)
    images, held_out = training_images(recipe.data), held_out_images(recipe.data)
    require_enough(len(images), recipe.fit, processes)
    backbone = load_backbone(recipe.backbone.model_copy(update={"device_map": None, "quantization_config": None}), META)
    require_tokens(recipe, backbone, images)
    teachers = load_teachers(recipe.teachers, META)
    steps, disk = count_steps(len(images), recipe.fit), disk_bytes(recipe, backbone.hidden_size, teachers, layers)
    window = plan_window(recipe, backbone, teachers.values(), layers, images, processes)
    facts = {} if out is None else {"run": f"{out} ({_state(out, recipe, steps, disk)})"}
    facts |= {
        "checkpoint": f"{recipe.backbone.checkpoint}, layers {', '.join(map(layer_name, layers))}",
        "images": f"{len(images):,} of {images.split} to train on, {len(held_out):,} of {held_out.split} held out",
        "teachers": ", ".join(f"{name} ({teacher.id})" for name, teacher in teachers.items()),
        "controls": f"{', '.join(['mean target', *recipe.controls])}; seeds: {', '.join(map(str, recipe.fit.seeds))}",
        "steps": f"{steps:,} of {recipe.fit.batch_size} images"
        + (", and as many with random weights" if "random" in recipe.controls else ""),
    }
    if len(images) <= recipe.fit.batch_size:
        facts["code_length"] = "not measured, because all images are one batch; lower fit.batch_size"
    if window:
        facts["buffer"] = f"holds {window:,} images; every image goes through the checkpoint once"
    try:
        return Plan(facts, _work(recipe, backbone, teachers, images, processes, 1 if window else recipe.fit.epochs))
    except UnknownCostError as error:
        return Plan(facts | {"cost": f"unknown: {error}; training works all the same", "disk": f"{disk / 1e9:.3g} GB"})


def _work(
    recipe: ProbeRunRecipe,
    backbone: Backbone,
    teachers: dict[str, Teacher],
    images: ImageList,
    processes: int,
    forward_passes: int,
) -> Work:
    """Costs a training; memory of activations is a rough estimate."""
    fit, layers, width = recipe.fit, parse_layers(recipe.layers, backbone.layers), backbone.hidden_size
    image = first_image(images, recipe.data.view)
    batch = backbone.prepare([image])
    tokens = batch.tokens.kinds.shape[1]
    keys = batch.tokens.select(torch.zeros(1, tokens, 1), recipe.probe.keys)[0].shape[1]
    deepest = backbone.layers if FINAL in layers else int(max(layers))
    shuffled, random = "shuffled" in recipe.controls, "random" in recipe.controls
    passes, micro = fit.epochs * (1 + random), min(fit.micro_batch, -(-min(fit.batch_size, len(images)) // processes))
    encoders = getattr(backbone.core, "teachers", {})  # of a multi-encoder checkpoint; they run with its tower
    seen = [trace(one.target, pixels=one.prepare([image])) for one in teachers.values()]
    tower = image_cost(backbone.core, batch.inputs)
    forward = forward_passes / fit.epochs  # of a visit
    checkpoint = forward * (tower.flops + sum(decoder_flops(backbone.blocks[:deepest], tokens, width)))
    shapes = [one.shape for one in teachers.values()]
    configs = probe_configs(recipe.probe, width, teachers).values()
    probe = sum(resampler_flops(config, keys, states_need_grad=False) for config in configs)
    probes = probe * len(layers) * len(fit.seeds) * (1 + shuffled + random) / (1 + random)
    rows, positions = {one.grid: one.shape[0] for one in teachers.values()}, len(fit.positions)
    products = sum(width * n for n in rows.values()) + 2 * sum(n * d for n, d in shapes)
    ridge = 2 * width * (products + positions * (width + 2 * sum(d for _, d in shapes))) * fit.ridge
    bits = 8 * next(backbone.core.parameters()).element_size()
    parameters = len(layers) * (1 + shuffled) * probe_parameters(recipe, width, teachers)
    block = tokens * (3 * widest(backbone.blocks) + 4 * width) * bits // 8
    fitted = tokens * width * 16 + max(40 * n * d for n, d in shapes)
    weights = weight_bytes(backbone.core) + sum(weight_bytes(one.model) for one in encoders.values())
    sums = len(layers) * ridge_bytes(recipe, width, teachers)
    disk = disk_bytes(recipe, width, teachers, layers)
    activations = micro * max(block + fitted, *(4 * one.largest for one in [tower, *seen]))
    return Work(
        samples=f"{len(images):,} images x {passes} passes",
        count=len(images) * passes,
        parts={
            "checkpoint": Part(checkpoint * (bits == 16), checkpoint * (bits > 16), weights),
            "teachers": Part(
                flops32=forward * sum(cost.flops for cost in seen),
                memory=sum(weight_bytes(one.model) for one in teachers.values()),
            ),
            "probes with gradients and moments": Part(
                probes * fit.bf16, probes * (not fit.bf16), 16 * parameters, disk - 2 * sums
            ),
            # summed on an image's first visit alone; on disk, two states while one replaces the other
            "ridge sums": Part(flops32=ridge * len(layers) / fit.epochs, memory=sums, disk=2 * sums),
            f"activations of {micro} images": Part(memory=activations),
        },
        images=forward,
    )


def _state(out: Path, recipe: ProbeRunRecipe, steps: int, disk: int) -> str:
    """Says how far a run is; raises UserError where training would refuse the folder."""
    begun = holds_run(out, recipe)
    if (out / "manifest.json").exists():
        return "finished; nothing to do"
    require_space(out, disk)
    if not begun:
        return "new"
    run, trained = Run(out, recipe), WEIGHTS if "random" in recipe.controls else WEIGHTS[:1]
    return "; ".join(f"{TITLES[weights]}: {_progress(run, weights, steps)}" for weights in trained)


def _progress(run: Run, weights: str, steps: int) -> str:
    state = run.path / "state" / weights / "state.pt"
    if summary_file(run, weights).exists():
        return "trained"
    if parts := list(state.parent.glob("state_*.pt")):  # of processes that share the layers
        done = min(int(part.suffixes[0][1:]) for part in parts)
    elif not state.exists():
        return "from the start"
    else:
        with reading(state, f"remove {state.parent} to train from the start"):
            done = int(torch.load(state, map_location="meta", weights_only=True, mmap=True)["step"])
    return f"resumes after step {done:,} of {steps:,}"
