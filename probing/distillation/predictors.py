"""Embedding predictors: what a layer's states say about a teacher's features, while the model is trained.

The block is the probes' resampler (OLA-VLM, arXiv:2412.09585, sec. 4). Its queries are latents of the task, as wide as
the LLM and shared by the task's layers; pooled, they are the task's special tokens too.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
        name: `gen`, `depth` or `seg`, or that of a plain encoder.
        layers: decoder blocks whose states are read.
        weight: of the task's losses.
        shape: (N, D) of the target.
    """

    name: str
    layers: tuple[int, ...]
    weight: float
    shape: tuple[int, int]


class EmbeddingPredictors(nn.Module):
    """Predictors of all tasks and layers, their queries, and the learnable scales of the contrast."""

    def __init__(
        self, tasks: Sequence[Task], width: int, seek: int, keys: Sequence[str], heads: int = 4, dim_head: int = 32
    ) -> None:
        """Builds fresh predictors from torch's current random state.

        Args:
            tasks: in the order of their special tokens.
            width: hidden size H of the LLM.
            seek: special tokens per task; with 0 every predictor has latents of its own, as a probe has.
            keys: kinds of tokens that predictors read; `special` stands for the task's own.
            heads: attention heads.
            dim_head: width of one head.

        Raises:
            UserError: `seek` does not divide the number of a task's queries.
        """
        super().__init__()
        self.tasks, self.seek, self.keys = list(tasks), seek, list(keys)
        self.queries, self.scales = nn.ParameterDict(), nn.ParameterDict()
        self.predictors = nn.ModuleDict()
        for task in tasks:
            tokens, output = task.shape
            if seek and tokens > 1 and tokens % seek:
                raise UserError(
                    f"seek = {seek} does not divide the {tokens} queries of {task.name}: special tokens are means over "
                    f"equally many; choose one of {', '.join(str(n) for n in range(1, 33) if tokens % n == 0)}"
                )
            if seek:
                self.queries[task.name] = nn.Parameter(torch.randn(tokens if tokens > 1 else seek, width))
            self.scales[task.name] = nn.Parameter(torch.tensor(INITIAL_SCALE))
            for layer in task.layers:
                config = ResamplerConfig(width, tokens, output, output, heads, dim_head)
                predictor = Resampler(config)
                predictor.latents.requires_grad_(not seek)
                self.predictors[f"{task.name}_{layer}"] = predictor

    def special(self) -> Tensor:
        """Embeddings (tasks · seek, H) of the special tokens, in their order.

        Spatial queries are averaged over equally many neighbours; those of a single-token target are the tokens.
        """
        rows = []
        for task in self.tasks:
            queries = self.queries[task.name]
            rows.append(queries if task.shape[0] == 1 else queries.unflatten(0, (self.seek, -1)).mean(dim=1))
        return torch.cat(rows)

    def _queries(self, task: Task) -> Tensor | None:
        if not self.seek:
            return None
        queries = self.queries[task.name]
        return queries.mean(dim=0, keepdim=True) if task.shape[0] == 1 else queries

    def _kinds(self, task: Task) -> list[str]:
        """Kinds of tokens that a task's predictors read; a plain encoder has no special tokens."""
        own = [task.name] if task.name in SPECIAL else []
        return [kind for key in self.keys for kind in (own if key == "special" else [key])]

    def predict(self, task: Task, layer: int, states: Tensor, kinds: Tensor) -> Tensor:
        """Predicts a task's target from one layer's states.

        Args:
            task: one of `tasks`.
            layer: one of its layers.
            states: (B, T, H).
            kinds: (B, T), from `probing.models.token_map.token_kinds`; tokens of other tasks are left out.

        Returns:
            (B, N, D).
        """
        keys, mask = TokenMap(kinds, (0, 0)).select(states, self._kinds(task))
        return self.predictors[f"{task.name}_{layer}"](keys, mask, self._queries(task))

    def bank(self) -> ProbeBank:
        """The predictors as probes: each with latents of its own, which its queries become once they are fixed."""
        probes = {}
        for task in self.tasks:
            for layer in task.layers:
                predictor = cast(Resampler, self.predictors[f"{task.name}_{layer}"])
                probe = Resampler(predictor.config)
                probe.load_state_dict(predictor.state_dict())
                queries = self._queries(task)
                if queries is not None:
                    with torch.no_grad():
                        probe.latents.copy_(predictor.proj_in(queries)[None])
                probes[ProbeKey(task.name, layer, 0)] = probe
        return ProbeBank(probes, {task.name: self._kinds(task) for task in self.tasks})

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes a probe bank, and beside it queries and scales, from which training goes on."""
        self.bank().save(folder, provenance)
        state = {f"queries.{name}": value.detach().cpu().clone() for name, value in self.queries.items()}
        state |= {f"scale.{name}": value.detach().cpu().clone() for name, value in self.scales.items()}
        save_file(state, folder / "queries.safetensors")

    def load(self, folder: Path) -> None:
        """Takes over what `save` wrote.

        Raises:
            UserError: the saved predictors are of other tasks, layers or sizes.
        """
        try:
            state = load_file(folder / "queries.safetensors")
            bank = ProbeBank.load(folder, torch.device("cpu"), [task.name for task in self.tasks])
            with torch.no_grad():
                for name, value in self.queries.items():
                    value.copy_(state[f"queries.{name}"])
                for name, value in self.scales.items():
                    value.copy_(state[f"scale.{name}"])
            for task in self.tasks:
                for layer in task.layers:
                    saved = bank.probes[ProbeKey(task.name, layer, 0)].state_dict()
                    self.predictors[f"{task.name}_{layer}"].load_state_dict(saved)
        except (KeyError, RuntimeError, OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{folder} holds other embedding predictors than the recipe asks for ({error}); give embedding the "
                "tasks, layers, seek and teachers that they were trained with"
            ) from None
