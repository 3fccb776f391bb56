"""The model of a stage: a LLaVA, and what is trained beside it."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers.modeling_layers import GradientCheckpointingLayer

from probing.distillation.losses import embedding_losses
from probing.distillation.patch_alignment import PatchAlignment
from probing.distillation.predictors import EmbeddingPredictors
from probing.distillation.sample_log import Notes
from probing.models.decoder import decoder_parts
from probing.models.multi_encoder import Encoders
from probing.models.token_map import SpecialEmbeddings, token_kinds

TRAINED_PARTS = {
    "pt": ("multi_modal_projector",),
    "vpt": ("vision_tower", "multi_modal_projector", "language_model", "lm_head"),
    "ift": ("multi_modal_projector", "language_model", "lm_head"),
}
"""Parts of the LLaVA that each stage trains (OLA-VLM, sec. 5.1)."""


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class Trainee(nn.Module):
    """A LLaVA inside a plain module.

    The model is composed, not subclassed, and the Trainer sees no PreTrainedModel: it would save such a one under
    legacy tensor names and, on resuming, silently fail to load them.

    Attributes:
        model: the LLaVA.
        embedding: predictors, where the stage has embedding losses.
        special: embeddings of special tokens where they come from no predictor's queries, (tokens, H).
    """

    def __init__(
        self,
        model: Any,
        stage: str,
        notes: Notes | None = None,
        embedding: EmbeddingPredictors | None = None,
        contrastive: float = 0.0,
        special_ids: dict[str, list[int]] | None = None,
        train_special: bool = False,
        encoders: Encoders | None = None,
        patches: PatchAlignment | None = None,
    ) -> None:
        """Decides what is trained.

        Args:
            model: a `LlavaForConditionalGeneration`.
            stage: `pt`, `vpt` or `ift`.
            notes: where to note samples that are left out.
            embedding: predictors.
            contrastive: weight of the contrast beside smooth L1.
            special_ids: ids of each task's special tokens, where the checkpoint has them.
            train_special: whether they are trained.
            encoders: of a multi-encoder checkpoint; installed in the model already.
            patches: draws image tokens to words.
        """
        super().__init__()
        self.model, self.notes, self.encoders = model, notes, encoders
        self.embedding, self.contrastive, self.patches = embedding, contrastive, patches
        self.special_ids = special_ids or {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in TRAINED_PARTS[stage]))
        self.special: nn.Parameter | None = None
        if embedding is not None:
            for parameter in embedding.queries.parameters():
                parameter.requires_grad_(train_special)
            for parameter in embedding.scales.parameters():
                parameter.requires_grad_(contrastive > 0)
        if self.special_ids:
            ids = [number for numbers in self.special_ids.values() for number in numbers]
            self.placed = SpecialEmbeddings(ids)
            if embedding is None:
                rows = model.get_input_embeddings().weight.detach()[ids].clone()
                self.special = nn.Parameter(rows, requires_grad=train_special)
            model.get_input_embeddings().register_forward_hook(self._place_special)
        once = {name for name, _ in self.named_parameters()}
        # The Trainer asks for this name, and ties weights again where exactly these are missing from a saved state.
        self._keys_to_ignore_on_save = [n for n, _ in self.named_parameters(remove_duplicate=False) if n not in once]
        self.step_losses: dict[str, Tensor] = {}
        self.step_parts: list[tuple[list[str], Tensor]] = []
        self.gradient_norm: float | None = None
        self.logged: dict[str, Tensor] = {}
        self.steps_logged = 0

    def special_rows(self) -> Tensor:
        """Embeddings (tokens, H) of the special tokens, in the order of `special_ids`."""
        if self.special is not None:
            return self.special
        assert self.embedding is not None
        return self.embedding.special()

    def _place_special(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.placed.place(args[0], output, self.special_rows())

    def tie_weights(self) -> None:
        """For the Trainer, after it has loaded a saved state."""
        self.model.tie_weights()

    def train(self, mode: bool = True) -> "Trainee":
        """Frozen parts stay in eval mode: no dropout in what is not trained."""
        super().train(mode)
        for part in (self.model.model.vision_tower, self.model.model.language_model, self.model.lm_head):
            if any(parameter.requires_grad for parameter in part.parameters()):
                continue
            part.eval()
            for layer in part.modules():
                if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                    layer.training = mode  # it checkpoints in training mode only; what is inside it stays in eval mode
        return self

    @contextlib.contextmanager
    def _states(self) -> Iterator[dict[int, Tensor]]:
        """Gathers what losses read during a forward pass: states of blocks, and at 0 the projector's output."""
        states: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                states[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        tasks = self.embedding.tasks if self.embedding is not None else []
        blocks, _ = decoder_parts(self.model)
        layers = {layer for task in tasks for layer in task.layers}
        handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in sorted(layers)]
        if self.patches is not None:
            handles.append(self.model.model.multi_modal_projector.register_forward_hook(keep(0)))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def losses(
        self,
        labels: Tensor,
        items: Tensor | None,
        inputs: dict[str, Any],
        targets: dict[str, Any] | None,
        patches: dict[str, Tensor] | None,
    ) -> dict[str, tuple[float, Tensor]]:
        """The stage's named losses, each with its weight in the sum that is minimised.

        Args:
            labels: (B, T).
            items: supervised tokens of the whole accumulated batch.
            inputs: the model's own.
            targets: from `probing.distillation.teacher_targets.attach_targets`; None where no sample of the
            micro-batch has one.
            patches: from `probing.distillation.patch_alignment.attach_pairs`; None where the micro-batch has no image.
        """
        items = None if items is None else items.clamp(min=1)  # a batch may have nothing to learn from
        if self.encoders is not None and targets is not None:
            self.encoders.begin(targets["features"], targets["rows"], len(labels))
        with self._states() as states:
            output = self.model(**inputs, labels=labels, num_items_in_batch=items, use_cache=False)
        if self.encoders is not None:
            self.encoders.end()
        named = {"next_token": (1.0, output.loss)}
        nothing = output.loss.new_zeros(())
        if self.patches is not None:
            aligned = nothing
            if patches is not None:
                aligned = self.patches.loss(states[0], **patches, embed=self.model.get_input_embeddings())
            named[self.patches.name] = (self.patches.weight, aligned)
        if self.embedding is None:
            return named
        rows = targets["rows"] if targets else None
        for task in self.embedding.tasks:
            for layer in task.layers:
                smooth, contrast = nothing, nothing
                if targets is not None:
                    kinds = token_kinds(
                        inputs["input_ids"], inputs["attention_mask"], self.model.config.image_token_id,
                        self.special_ids, labels,
                    )  # fmt: skip
                    prediction = self.embedding.predict(task, layer, states[layer][rows], kinds[rows])
                    smooth, contrast = embedding_losses(
                        prediction, targets["features"][task.name], targets["others"][task.name], targets["own"],
                        self.embedding.scales[task.name], targets["images"],
                    )  # fmt: skip
                named[f"{task.name}.{layer}.smooth_l1"] = (task.weight, smooth)
                if self.contrastive > 0:
                    named[f"{task.name}.{layer}.contrast"] = (task.weight * self.contrastive, contrast)
        return named

    def forward(
        self,
        labels: Tensor,
        names: list[str] | None = None,
        skipped: list[str] | None = None,
        cut: list[str] | None = None,
        unlabelled: list[str] | None = None,
        scaled: list[str] | None = None,
        num_items_in_batch: Tensor | None = None,
        targets: dict[str, Any] | None = None,
        patches: dict[str, Tensor] | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """One micro-batch; every loss is its part of the mean over the whole batch.

        Args:
            labels: (B, T), ignored positions -100.
            names: of the samples.
            skipped: samples of this micro-batch that were left out.
            cut: samples of this micro-batch that were too long.
            unlabelled: images of this micro-batch whose annotations cannot be used.
            scaled: images of this micro-batch whose label maps were scaled to their size.
            num_items_in_batch: supervised tokens of the whole accumulated batch, from the Trainer.
            targets: teachers' features, where the stage has embedding losses.
            patches: labels of patches, where the stage draws them to words.
            **inputs: the model's own.
        """
        if self.notes is not None:
            self.notes.add("skipped", skipped or [])
            self.notes.add("cut", cut or [])
            self.notes.add("unlabelled", unlabelled or [])
            self.notes.add("scaled", scaled or [])
        named = self.losses(labels, num_items_in_batch, inputs, targets, patches)
        for name, (_, value) in named.items():
            self.step_losses[name] = self.step_losses.get(name, 0.0) + value.detach().float()
        self.step_parts.append((names or [], torch.stack([value.detach().float() for _, value in named.values()])))
        loss = torch.stack([weight * value for weight, value in named.values()]).sum()
        # Every trained part takes part in every backward pass: without it a stage that trains nothing else has no
        # gradient at all, and several processes would wait for each other's.
        if "pixel_values" not in inputs:
            projector = self.model.model.multi_modal_projector
            nothing = loss.new_zeros((1, 1, projector.linear_1.in_features), dtype=projector.linear_1.weight.dtype)
            loss = loss + 0.0 * projector(nothing).sum()
        if targets is None:
            modules = [module for module in (self.embedding, self.encoders) if module is not None]
            beside = [*(parameter for module in modules for parameter in module.parameters()), self.special]
            for parameter in beside:
                if parameter is not None and parameter.requires_grad:
                    loss = loss + 0.0 * parameter.sum()
        return {"loss": loss}

    def not_finite(self) -> str:
        """Names the loss or gradient of this step that is not finite, and its samples; empty where all are."""
        if self.step_losses and not bool(torch.isfinite(torch.stack(list(self.step_losses.values()))).all()):
            name = next(name for name, value in self.step_losses.items() if not bool(torch.isfinite(value)))
            bad = [sample for names, values in self.step_parts for sample in names if not bool(values.isfinite().all())]
            return f"the loss {name} of {_few(bad)}" if bad else f"the loss {name}"
        if self.gradient_norm is not None and not math.isfinite(self.gradient_norm):
            return f"the gradient of {_few([sample for names, _ in self.step_parts for sample in names])}"
        return ""

    def finish_step(self) -> None:
        """Adds the losses of a step to those that are logged next."""
        for name, value in self.step_losses.items():
            self.logged[name] = self.logged.get(name, 0.0) + value
        self.step_losses, self.step_parts, self.steps_logged = {}, [], self.steps_logged + 1

    def take_logged(self) -> dict[str, Tensor]:
        """Mean of every loss over the steps since the last call, this process's part of it."""
        taken = {name: value / max(self.steps_logged, 1) for name, value in self.logged.items()}
        self.logged, self.steps_logged = {}, 0
        return taken

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tied weights are listed once; safetensors refuses to write them twice."""
        state = super().state_dict(*args, **kwargs)
        for name in self._keys_to_ignore_on_save:
            state.pop(kwargs.get("prefix", "") + name, None)
        return state
