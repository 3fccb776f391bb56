"""What a training stage takes, known before any weights are there: memory, work, time, disk."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from analysis.planning.probe_training import Devices, short
from probing.data.conversations import CutInsideImageError
from probing.distillation.patch_alignment import attach_pairs
from probing.distillation.recipe import DistillRecipe
from probing.distillation.setup import Parts, open_start, put_together
from probing.distillation.teacher_targets import attach_targets
from probing.utils.errors import UserError
from probing.utils.meta_device import META, autocast, backward, count_flops, dry_run

SAMPLED = 64
"""Conversations whose lengths are looked at, two micro-batches at least."""


@dataclass(frozen=True)
class StageCost:
    """What one process takes on its device, in bytes, where nothing is sharded, and what the whole stage takes.

    Attributes:
        weights: of the model, predictors and the like, float32.
        teachers: weights of the teachers.
        gradients: of what is trained; several processes keep them twice, because DistributedDataParallel sends them in
            buckets.
        moments: AdamW's two.
        step: what a step needs besides, at its peak.
        trained: number of trained parameters.
        conversations: of one optimiser step, over all processes.
        steps: of the optimiser.
        micro_batch: conversations of one forward pass.
        width: tokens of a forward pass that is about as wide as the mean, padding included; `flops` are of such a one.
        widest: tokens of the widest that was looked at; `step` is of such a one.
        flops: per conversation, forward and backward, blocks that are run again and teachers included.
        long: those of them in 32-bit numbers.
        disk: at its fullest.
        checkpoint: bytes of what stays.
    """

    weights: int
    teachers: int
    gradients: int
    moments: int
    step: int
    trained: int
    conversations: int
    steps: int
    micro_batch: int
    width: int
    widest: int
    flops: int
    long: int
    disk: int
    checkpoint: int

    @property
    def memory(self) -> int:
        """Peak of the device's memory."""
        return self.weights + self.teachers + self.gradients + self.moments + self.step

    def lines(self, devices: Devices) -> list[str]:
        """For people; a GB has 10^9 bytes."""
        seen = self.steps * self.conversations
        work = f"{self.steps:,} steps x {self.conversations} conversations x {short(self.flops, 'FLOP')}"
        wide = f"{self.long / self.flops:.0%} in 32-bit numbers"
        long = f"a conversation of {self.width:,} tokens, padding included"
        named = {
            "weights": self.weights,
            "teachers": self.teachers,
            f"gradients of {short(self.trained, '').strip()} parameters": self.gradients,
            "moments": self.moments,
            f"a forward pass of {self.micro_batch} conversations of {self.widest:,} tokens": self.step,
        }
        parts = ", ".join(f"{name} {short(size, 'B')}" for name, size in named.items() if size)
        memory = f"{short(self.memory, 'B')} in one unsharded process ({parts})"
        if devices.number > 1:
            whole = self.weights + self.gradients // 2 + self.moments
            each = short(whole // devices.number, "B")
            memory += f"; FSDP leaves {each} of {short(whole, 'B')} of weights, gradients and moments on each"
        return [
            f"training, work: {work} = {short(seen * self.flops, 'FLOP')}, {wide}; {long}",
            f"training, time: {devices.time(seen * (self.flops - self.long), seen * self.long)}",
            f"training, memory of a device: {memory}",
            f"training, disk: {short(self.disk, 'B')} at its fullest, {short(self.checkpoint, 'B')} in the end",
        ]


def stage_cost(recipe: DistillRecipe, processes: int = 1) -> StageCost:
    """Runs two micro-batches on shapes alone, and counts; configurations, processors and data are read, and no weights.

    What an allocator keeps besides what is asked of it does not count, nor does what FSDP or DeepSpeed would shard.

    Args:
        recipe: the stage.
        processes: that share the conversations.

    Raises:
        UserError: as training would, but for faults in the weights.
    """
    micro, accumulated = recipe.cut_up(processes)
    start = open_start(recipe)
    with dry_run() as usage:
        parts = put_together(recipe, start, META)
        trainee = parts.trainee.train()
        weights = sum(p.numel() * p.element_size() for p in trainee.parameters())
        frozen = sum(p.numel() * p.element_size() for t in parts.teachers.values() for p in t.model.parameters())
        trained = [p for p in trainee.parameters() if p.requires_grad]
        moments = [torch.zeros_like(p) for p in trained for _ in range(2)]
        sampled = _micro_batches(parts, recipe, micro)
        mean = sum(width for width, _ in sampled) / len(sampled)
        width, typical = min(sampled, key=lambda one: abs(one[0] - mean))
        widest, wide = max(sampled)
        with count_flops() as flops:
            _pass(recipe, parts, typical, accumulated, processes)
        if accumulated == 1:
            trainee.zero_grad(set_to_none=True)
        usage.peak = usage.bytes
        _pass(recipe, parts, wide, accumulated, processes)
        size = 4 * sum(p.numel() for p in trained)
        step = usage.peak - weights - frozen - 3 * size
        del moments
    state = weights + 2 * size
    return StageCost(
        weights=weights,
        teachers=frozen,
        gradients=size * (2 if processes > 1 else 1),
        moments=2 * size,
        step=step,
        trained=size // 4,
        conversations=recipe.global_batch,
        steps=recipe.steps(len(start.conversations)),
        micro_batch=micro,
        width=width,
        widest=widest,
        flops=flops() // micro,
        long=flops.long // micro,
        disk=2 * state,
        checkpoint=weights,
    )


def _micro_batches(parts: Parts, recipe: DistillRecipe, micro: int) -> list[tuple[int, list[int]]]:
    """Some micro-batches in the order of training: tokens of the longest conversation, and which they are."""
    samples = parts.samples
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(samples), generator=generator).tolist()[: max(SAMPLED, 2 * micro)]
    found = []
    for at in range(0, len(order), micro):
        chosen = order[at : at + micro]
        widths = [_width(parts, index) for index in chosen]
        found.append((max(widths), chosen))
    whole = [one for one in found if len(one[1]) == micro]
    return whole or found


def _width(parts: Parts, index: int) -> int:
    """Tokens of a conversation; any image makes as many."""
    conversation = parts.samples.conversations[index]
    try:
        sample = parts.encoder(conversation, [Image.new("RGB", (8, 8))] * len(conversation.images))
    except CutInsideImageError:
        return 2
    return len(sample["input_ids"])


def _pass(recipe: DistillRecipe, parts: Parts, chosen: list[int], accumulated: int, processes: int) -> None:
    """One micro-batch, forward and backward, as the Trainer does it with the others of its step waiting."""
    samples = [parts.samples[index] for index in chosen]
    if all("skipped" in sample for sample in samples):
        raise UserError(f"none of {len(samples)} conversations could be used, first: {samples[0]['skipped']}")
    batch: dict[str, Any] = parts.collate(samples)
    for name in [
        name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]:
        batch[name] = batch[name].to(META)
    if parts.teachers:
        attach_targets([batch], parts.teachers, 1)
    if parts.trainee.patches is not None:
        attach_pairs([batch], parts.trainee.patches.least, META, 1)
    targets, waiting = batch.get("targets"), []
    if targets is not None:
        # those of the step's other micro-batches, and what every process has gathered of all
        waiting = [torch.empty_like(f) for f in targets["features"].values() for _ in range(accumulated - 1)]
        images = targets["images"] * accumulated * processes
        targets["others"] = {name: rows.new_empty(images, rows.shape[1]) for name, rows in targets["others"].items()}
        targets["images"] = images
    items = (batch["labels"] >= 0).sum()
    with autocast() if recipe.bf16 else contextlib.nullcontext():
        loss = parts.trainee(**batch, num_items_in_batch=items)["loss"]
    with autocast(keep=False) if recipe.bf16 else contextlib.nullcontext():
        backward(loss)
    del waiting
