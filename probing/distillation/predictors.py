"""Embedding predictors: resamplers that predict a teacher's features from a layer's states during distillation.

The block is the probes' (OLA-VLM, arXiv:2412.09585, sec. 4). Its queries are as wide as the LLM and shared by a task's
layers; pooled, they are the task's special tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probing.distillation.recipe import EmbeddingRecipe
from probing.distillation.special_tokens import pool_queries
from probing.models.token_map import SPECIAL, TokenMap
from probing.probes.bank import ProbeBank, ProbeKey
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.utils.errors import UserError

FOLDER = "predictors"
INITIAL_SCALE = 2.0


@dataclass(frozen=True)
class Task:
    """One teacher that the model is trained towards.

    Attributes:
        name: `gen`, `depth` or `seg`, or the name of a plain encoder.
        layers: decoder blocks whose states are read.
        weight: of the task's losses.
        shape: (N, D) of the target.
    """

    name: str
    layers: tuple[int, ...]
    weight: float
    shape: tuple[int, int]


class EmbeddingPredictors(nn.Module):
    """Predictors of all tasks and layers, their queries, and the learnable scales of InfoNCE."""

    def __init__(self, tasks: Sequence[Task], width: int, recipe: EmbeddingRecipe) -> None:
        """Initialises predictors from torch's random state.

        Args:
            tasks: in the order of their special tokens.
            width: hidden size H of the LLM.
            recipe: with `seek`, the number of special tokens per task; if 0, each predictor has its own latents.

        Raises:
            UserError: `seek` does not divide the number of a task's queries.
        """
        super().__init__()
        self.tasks, self.width, self.recipe = list(tasks), width, recipe
        self.queries, self.scales = nn.ParameterDict(), nn.ParameterDict()
        self.predictors = nn.ModuleDict()
        seek = recipe.seek
        for task in tasks:
            tokens, output = task.shape
            if seek and tokens > 1 and tokens % seek:
                choices = ", ".join(str(n) for n in range(1, 33) if tokens % n == 0)
                raise UserError(f"seek = {seek} does not divide the {tokens} queries of {task.name}; choose {choices}")
            if seek:
                self.queries[task.name] = nn.Parameter(torch.randn(tokens if tokens > 1 else seek, width))
            self.scales[task.name] = nn.Parameter(torch.full((1,), INITIAL_SCALE))  # FSDP2 shards no scalars
            for layer in task.layers:
                predictor = Resampler(ResamplerConfig(width, tokens, output, output, recipe.heads, recipe.dim_head))
                predictor.latents.requires_grad_(not seek)
                self.predictors[f"{task.name}_{layer}"] = predictor

    def pairs(self) -> Iterator[tuple[Task, int]]:
        """Iterates over tasks and their layers."""
        return ((task, layer) for task in self.tasks for layer in task.layers)

    def special_rows(self) -> Tensor:
        """Returns the embeddings (tasks * seek, H) of the special tokens."""
        return pool_queries([self.queries[task.name] for task in self.tasks], self.recipe.seek)

    def _queries(self, task: Task) -> Tensor | None:
        if not self.recipe.seek:
            return None
        queries = self.queries[task.name]
        return queries.mean(dim=0, keepdim=True) if task.shape[0] == 1 else queries

    def key_kinds(self, task: Task) -> list[str]:
        """Returns the kinds of tokens that a task's predictors read; a plain encoder has no special tokens."""
        own = [task.name] if task.name in SPECIAL else []
        return [kind for key in self.recipe.keys for kind in (own if key == "special" else [key])]

    def predict(self, task: Task, layer: int, states: Tensor, tokens: TokenMap) -> Tensor:
        """Predicts a task's target (B, N, D) from a layer's states (B, T, H)."""
        keys, mask = tokens.select(states, self.key_kinds(task))
        return self.predictors[f"{task.name}_{layer}"](keys, mask, self._queries(task))

    def bank(self) -> ProbeBank:
        """Returns the predictors as probes, whose latents are the projected queries."""
        probes = {}
        for task, layer in self.pairs():
            predictor = cast(Resampler, self.predictors[f"{task.name}_{layer}"])
            probe = Resampler(predictor.config)
            probe.load_state_dict(predictor.state_dict())
            if (queries := self._queries(task)) is not None:
                with torch.no_grad():
                    probe.latents.copy_(predictor.proj_in(queries)[None])
            probes[ProbeKey(task.name, layer, 0)] = probe
        return ProbeBank(probes, {task.name: self.key_kinds(task) for task in self.tasks})

    def save(self, folder: Path, state: Mapping[str, Tensor], provenance: dict[str, Any]) -> None:
        """Writes a probe bank, with queries and scales, from which training resumes; `state` is unsharded."""
        with torch.device("meta"):
            own = EmbeddingPredictors(self.tasks, self.width, self.recipe)
        own.load_state_dict({name: tensor.detach().cpu() for name, tensor in state.items()}, assign=True)
        own.bank().save(folder, provenance)
        tensors = {f"queries.{name}": value.detach().clone() for name, value in own.queries.items()}
        tensors |= {f"scale.{name}": value.detach().clone() for name, value in own.scales.items()}
        save_file(tensors, folder / "queries.safetensors")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            UserError: the saved predictors have other tasks, layers or sizes.
        """
        try:
            tensors = load_file(folder / "queries.safetensors")
            bank = ProbeBank.load(folder, torch.device("cpu"), [task.name for task in self.tasks])
            with torch.no_grad():
                for name, value in self.queries.items():
                    value.copy_(tensors[f"queries.{name}"])
                for name, value in self.scales.items():
                    value.copy_(tensors[f"scale.{name}"])
            for task, layer in self.pairs():
                saved = bank.probes[ProbeKey(task.name, layer, 0)].state_dict()
                self.predictors[f"{task.name}_{layer}"].load_state_dict(saved)
        except (KeyError, RuntimeError, OSError) as error:
            raise UserError(
                f"{folder} does not fit embedding ({error}); use the tasks, layers, seek and teachers of its training"
            ) from None
