"""`probing distill --dry-run`, and `probing plan` of a training stage."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

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
from probing.data.conversations import CutInsideImageError
from probing.distillation.recipe import DistillRecipe
from probing.distillation.setup import Stage, StageInputs, build_stage, load_inputs
from probing.distillation.trainer import is_finished, last_state, require_same_recipe, work_folder
from probing.models.decoder import decoder_parts
from probing.probes.resampler import Resampler
from probing.utils.errors import UserError
from probing.utils.files import require_space
from probing.utils.units import si

SAMPLED = 64
"""Conversations whose lengths are measured, two micro-batches at least."""


def plan_stage(recipe: DistillRecipe, out: Path | None = None, processes: int = 1) -> Plan:
    """Checks a recipe as training does, without weights, and says what the stage does and takes; writes nothing.

    Args:
        recipe: the stage.
        out: folder of the new checkpoint.
        processes: that share the conversations.

    Raises:
        UserError: as `run_stage`, except for faults in the weights and in the section `trainer`.
    """
    facts = {}
    if out is not None:
        work = work_folder(out)
        if is_finished(recipe, out):
            return Plan({"checkpoint": f"{out} (finished; nothing to do)"})
        if saved := last_state(work):
            require_same_recipe(recipe, work / "recipe.yaml")
        state = f"resumes after step {int(saved.rsplit('-', 1)[1]):,}" if saved else "new"
        facts["checkpoint"] = f"{out} ({state}); training states in {work}"
    micro, _ = recipe.micro_batches(processes)
    start = load_inputs(recipe)
    parts = build_stage(recipe, start, META)
    facts |= {
        "starts from": f"{start.source}, stage {recipe.stage}",
        "data": f"{len(start.conversations):,} conversations",
        "teachers": ", ".join(parts.teachers) or "none",
        "steps": f"{recipe.steps(len(start.conversations)):,} of {recipe.global_batch} conversations",
    }
    weights = weight_bytes(parts.model)
    disk = 2 * (weights + 8 * _trained(parts.model))
    if out is not None:
        require_space(out, disk)
    facts["new checkpoint"] = si(weights, "B")
    try:
        return Plan(facts, _work(recipe, start, parts, micro, processes))
    except UnknownCostError as error:
        return Plan(facts | {"cost": f"unknown: {error}; training works all the same"})


def _work(recipe: DistillRecipe, start: StageInputs, parts: Stage, micro: int, processes: int) -> Work:
    """Costs a stage: a frozen part before everything that is trained has no backward pass.

    Activations for the backward pass, per block and token: inputs of norms, projections and products, about 11 H + 4 I.
    """
    model, bits = parts.model.model, 16 if recipe.bf16 else 32
    blocks, width = decoder_parts(model)[0], model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(parts.inputs.conversations), generator=generator).tolist()
    order = order[: max(SAMPLED, 2 * micro)]
    lengths = [_length(parts, index) for index in order]
    widths = [max(lengths[at : at + micro]) for at in range(0, len(lengths), micro)]
    tokens = round(sum(widths) / len(widths))
    shown = [index for index in order if parts.inputs.conversations[index].images]
    batch = _batch(parts, shown)
    share = len(shown) / len(order)  # of conversations with an image
    tower, trains_tower = image_cost(model.model, batch), _trained(model.model.vision_tower) > 0
    pixels = batch.get("teacher_pixels", {}) | {
        name: batch[key] for name in parts.teachers if (key := f"pixel_values_{name}") in batch
    }
    seen = [trace(one.target, pixels=pixels[name]) for name, one in parts.teachers.items() if name in pixels]
    products, attention = decoder_flops(blocks, tokens, width)
    again, trained = recipe.gradient_checkpointing, _trained(blocks) > 0
    repeated = 0.75 * products + attention  # a block is not run again as far as its last projection
    head = 2 * model.lm_head.weight.numel() * tokens
    flops = products * (2 + trained) + attention * 3 + again * repeated + head * (2 + (_trained(model.lm_head) > 0))
    flops += share * tower.flops * (3 if trains_tower else 1)
    contrast, predicted = 0, 0
    if predictors := [module for module in parts.model.modules() if isinstance(module, Resampler)]:
        for config in (predictor.config for predictor in predictors):
            flops += share * resampler_flops(config, tokens, states_need_grad=True)
            predicted += micro * config.width * (4 * max(widths) + 10 * config.queries)
        contrast = sum(n * d for n, d in (one.shape for one in parts.teachers.values())) * recipe.global_batch
    weights, parameters = weight_bytes(parts.model), _trained(parts.model)
    most = micro * max(widths)
    block = most * (11 * width + 4 * widest(blocks)) * bits // 8
    activations = block + 4 * len(blocks) * most * width if again else len(blocks) * block
    logits = 3 * 4 * most * len(model.lm_head.weight)
    copies = 2 * parameters if bits == 16 else 0
    activations += logits + copies + 4 * contrast + predicted * bits // 8
    activations += trains_tower * micro * tower.outputs * bits // 32
    peak = max([activations, *(4 * micro * one.largest for one in seen)])
    steps = recipe.steps(len(start.conversations))
    return Work(
        samples=f"{steps:,} steps x {recipe.global_batch} conversations of {tokens:,} tokens with padding",
        count=steps * recipe.global_batch,
        parts={
            "model": Part(flops * (bits == 16), flops * (bits == 32), weights, 2 * weights),
            "teachers": Part(
                flops32=share * sum(one.flops for one in seen),
                memory=sum(weight_bytes(one.model) for one in parts.teachers.values()),
            ),
            f"gradients of {si(parameters, '').strip()} parameters": Part(
                memory=4 * parameters * (2 if processes > 1 else 1)
            ),
            "moments": Part(memory=8 * parameters, disk=16 * parameters),
            f"activations of {micro} x {max(widths):,} tokens": Part(memory=peak),
        },
        sharded=weights + 12 * parameters,
        images=share,
    )


def _trained(module: nn.Module) -> int:
    """Counts trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _length(parts: Stage, index: int) -> int:
    """Returns the tokens of a conversation; every image has as many, whatever it shows."""
    conversation = parts.inputs.conversations[index]
    try:
        sample = parts.encoder(conversation, [Image.new("RGB", (8, 8))] * len(conversation.images))
    except CutInsideImageError:
        return 2
    return len(sample["input_ids"])


def _batch(parts: Stage, shown: list[int]) -> dict[str, Any]:
    """Collates the first of some conversations whose image can be read; empty where there are none at all."""
    skipped, samples = "", parts.dataset()
    for index in shown:
        sample = samples[index]
        if "skipped" not in sample:
            return parts.collate([sample])
        skipped = skipped or sample["skipped"]
    if skipped:
        raise UserError(f"none of {len(shown)} conversations could be used, first: {skipped}; correct image_root")
    return {}
