"""Losses next to next-token prediction: their interface, and the embedding losses of OLA-VLM (arXiv:2412.09585)."""

import abc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather, pad_across_processes
from torch import Tensor, nn

from probing.distillation.predictors import EmbeddingPredictors
from probing.models.token_map import TokenMap, token_kinds
from probing.teachers import Teacher

MAX_SCALE = 100.0


class AuxiliaryLoss(nn.Module, abc.ABC):
    """One or several named losses next to next-token prediction.

    Attributes:
        layers: states that `loss` reads: 0 is the projector's output, k the output of decoder block k.
        weights: weight of each loss in the total, by name.
        keys: entries that `prepare` adds to a micro-batch.
    """

    layers: set[int]
    weights: dict[str, float]
    keys: tuple[str, ...]

    @abc.abstractmethod
    def prepare(self, batches: list[dict[str, Any]], device: torch.device, world: int) -> None:
        """Adds to the micro-batches of one optimiser step what `loss` needs.

        It sees them together, and gathers from the other processes, so that no mean depends on how a batch is split.
        """

    @abc.abstractmethod
    def loss(self, states: dict[int, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Computes this micro-batch's share of each mean over the global batch, by name; what it omits is 0."""

    def save(self, folder: Path, state: Mapping[str, Tensor], provenance: dict[str, Any]) -> None:
        """Writes into a checkpoint what the loss trained; `state` holds the tensors of `state_dict`, unsharded."""


def embedding_losses(
    prediction: Tensor, target: Tensor, candidates: Tensor, positive: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes smooth L1 and InfoNCE (eqs. 1-3), as a micro-batch's share of the mean over the global batch.

    InfoNCE goes one way, from a prediction to all targets of the global batch, as in eq. 2. The paper divides cosines
    by a learnable tau that starts at 2.0, which hardly separates them; the released code multiplies by exp(s), s = 2.0
    at the start, at most 100, and so does this.

    Args:
        prediction: (B, N, D), of the samples with a target.
        target: (B, N, D).
        candidates: targets of the global batch as unit rows, (M, N * D).
        positive: (B) row of each sample's own target in `candidates`.
        scale: learnable scalar s.

    Returns:
        Two sums over the micro-batch, divided by M.
    """
    prediction, target = prediction.float(), target.float()
    if not len(prediction):
        return prediction.sum() * 0, prediction.sum() * 0
    share = len(prediction) / len(candidates)
    smooth = F.smooth_l1_loss(prediction, target) * share
    cosines = F.normalize(prediction.flatten(1), dim=1) @ candidates.float().T
    return smooth, F.cross_entropy(cosines * scale.exp().clamp(max=MAX_SCALE), positive) * share


def unit_rows(targets: Tensor) -> Tensor:
    """Flattens targets (M, N, D) to rows (M, N * D) of length 1."""
    return F.normalize(targets.float().flatten(1), dim=1)


def gather_rows(rows: Tensor, world: int) -> tuple[Tensor, int]:
    """Concatenates the rows (m, F) of all processes, m of each its own; returns also where this process's begin."""
    if world == 1:
        return rows, 0
    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = gather(pad_across_processes(rows).contiguous()).reshape(world, max(counts), -1)
    start = sum(counts[: torch.distributed.get_rank()])
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)]), start


class EmbeddingLoss(AuxiliaryLoss):
    """Pulls what predictors read in hidden states towards the teachers' features."""

    keys = ("targets",)

    def __init__(
        self,
        predictors: EmbeddingPredictors,
        teachers: dict[str, Teacher],
        contrastive: float,
        image_token_id: int,
        special_ids: dict[str, list[int]],
    ) -> None:
        """Collects what the loss reads.

        Args:
            predictors: of all tasks and layers.
            teachers: by name.
            contrastive: weight of InfoNCE relative to smooth L1; 0 omits it.
            image_token_id: id of the image token.
            special_ids: ids of each task's special tokens.
        """
        super().__init__()
        self.predictors, self.teachers = predictors, teachers
        self.image_token_id, self.special_ids = image_token_id, special_ids
        self.layers = {layer for _, layer in predictors.pairs()}
        self.weights = {}
        for task, layer in predictors.pairs():
            self.weights[f"{task.name}.{layer}.smooth_l1"] = task.weight
            if contrastive > 0:
                self.weights[f"{task.name}.{layer}.contrast"] = task.weight * contrastive
        predictors.scales.requires_grad_(contrastive > 0)

    def prepare(self, batches: list[dict[str, Any]], device: torch.device, world: int) -> None:
        """Replaces teachers' pixels by `targets`: features, and the candidates of InfoNCE from the global batch."""
        with_target = [batch for batch in batches if "target_rows" in batch]
        for batch in with_target:
            features, pixels = batch.pop("teacher_features", None), batch.pop("teacher_pixels", None)
            if features is None:
                features = {name: teacher.target(pixels[name]) for name, teacher in self.teachers.items()}
            features = {name: value.to(self.teachers[name].device) for name, value in features.items()}
            rows = batch.pop("target_rows")
            ids, attention, labels = (batch[name][rows].cpu() for name in ("input_ids", "attention_mask", "labels"))
            kinds = token_kinds(ids, attention, self.image_token_id, self.special_ids, labels)
            batch["targets"] = {"rows": rows, "features": features, "tokens": TokenMap(kinds, (0, 0))}
        candidates, start = {}, 0
        for name, teacher in self.teachers.items():
            rows = [unit_rows(batch["targets"]["features"][name]) for batch in with_target]
            empty = torch.zeros(0, math.prod(teacher.shape), device=teacher.device)
            candidates[name], start = gather_rows(torch.cat([empty, *rows]), world)
        for batch in with_target:
            rows = batch["targets"]["rows"]
            positive = torch.arange(start, start + len(rows), device=rows.device)
            batch["targets"] |= {"candidates": candidates, "positive": positive}
            start += len(rows)

    def loss(self, states: dict[int, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns `TASK.LAYER.smooth_l1` and `TASK.LAYER.contrast`."""
        targets = batch.get("targets")
        if targets is None:
            # a process without targets must still take part in the gradients that all processes exchange
            zero = 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
            return dict.fromkeys(self.weights, zero)
        rows = targets["rows"]
        losses: dict[str, Tensor] = {}
        for task, layer in self.predictors.pairs():
            smooth, contrast = embedding_losses(
                self.predictors.predict(task, layer, states[layer][rows], targets["tokens"]),
                targets["features"][task.name],
                targets["candidates"][task.name],
                targets["positive"],
                self.predictors.scales[task.name],
            )
            losses |= {f"{task.name}.{layer}.smooth_l1": smooth, f"{task.name}.{layer}.contrast": contrast}
        return {name: losses[name] for name in self.weights}

    def save(self, folder: Path, state: Mapping[str, Tensor], provenance: dict[str, Any]) -> None:
        """Writes the predictors as a probe bank."""
        own = {name.removeprefix("predictors."): tensor for name, tensor in state.items()}
        teachers = {name: {"id": t.id, "sha256": t.sha256, "shape": t.shape} for name, t in self.teachers.items()}
        self.predictors.save(folder, own, {"teachers": teachers, **provenance})
