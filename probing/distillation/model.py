"""The model that a stage trains: a LLaVA with auxiliary losses."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers.modeling_layers import GradientCheckpointingLayer

from probing.distillation.losses import AuxiliaryLoss
from probing.distillation.special_tokens import SpecialTokens
from probing.models.decoder import decoder_parts
from probing.models.image_tokens import feature_layer, image_size

PROJECTORS = ("multi_modal_projector", "teacher_projectors")
TRAINED_PARTS = {
    "pt": PROJECTORS,
    "vpt": ("vision_tower", *PROJECTORS, "language_model", "lm_head"),
    "ift": (*PROJECTORS, "language_model", "lm_head"),
}
"""Parts of the LLaVA that each stage trains (OLA-VLM, sec. 5.1)."""


class DistillationModel(nn.Module):
    """Adds auxiliary losses to a LLaVA.

    It wraps the LLaVA because the Trainer would save a PreTrainedModel under legacy tensor names and, when it resumes,
    silently fail to load them.

    Attributes:
        model: the LLaVA.
        auxiliary: losses next to next-token prediction.
        special: embeddings of special tokens, where the checkpoint has some.
    """

    auxiliary: Sequence[AuxiliaryLoss]

    def __init__(
        self, model: Any, stage: str, auxiliary: Sequence[AuxiliaryLoss] = (), special: SpecialTokens | None = None
    ) -> None:
        """Freezes the parts of the LLaVA that the stage (`pt`, `vpt` or `ift`) does not train."""
        super().__init__()
        self.model, self.special = model, special
        self.auxiliary = nn.ModuleList(auxiliary)  # type: ignore[assignment]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in TRAINED_PARTS[stage]))
        self._freeze_unread_layers()
        listed = {name for name, _ in self.named_parameters()}
        # The Trainer reads this name, and ties weights again if exactly these are missing from a saved state.
        self._keys_to_ignore_on_save = [n for n, _ in self.named_parameters(remove_duplicate=False) if n not in listed]

    def _freeze_unread_layers(self) -> None:
        """Freezes the tower's layers after the one that is read.

        They have no gradient, so no moments, and FSDP2 cannot resume a state that lacks those of a trained parameter.
        """
        trained = [parameter for parameter in self.model.model.vision_tower.parameters() if parameter.requires_grad]
        if not trained:
            return
        try:
            gradients = torch.autograd.grad(self._tower_output(trained[0]), trained, allow_unused=True)
        except RuntimeError:
            if not trained[0].is_meta:
                raise
            return  # some towers cannot run on shapes alone
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def tie_weights(self) -> None:
        """Ties weights after the Trainer loaded a saved state."""
        self.model.tie_weights()

    def train(self, mode: bool = True) -> "DistillationModel":
        """Keeps frozen parts in eval mode, without dropout."""
        super().train(mode)
        for part in (self.model.model.vision_tower, self.model.model.language_model, self.model.lm_head):
            if any(parameter.requires_grad for parameter in part.parameters()):
                continue
            part.eval()
            for layer in part.modules():
                if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                    layer.training = mode  # it checkpoints in training mode only; its children stay in eval mode
        return self

    @contextlib.contextmanager
    def _captured_states(self) -> Iterator[dict[int, Tensor]]:
        """Captures the states that auxiliary losses read; 0 is the projector's output."""
        states: dict[int, Tensor] = {}

        def capture(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                states[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        blocks, _ = decoder_parts(self.model)
        modules = [self.model.model.multi_modal_projector, *blocks]
        layers = {layer for auxiliary in self.auxiliary for layer in auxiliary.layers}
        handles = [modules[layer].register_forward_hook(capture(layer)) for layer in sorted(layers)]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, num_items_in_batch: Tensor | None = None, **batch: Any) -> dict[str, Any]:
        """Computes a micro-batch's share of the mean losses over the global batch.

        Args:
            num_items_in_batch: supervised tokens of the global batch, from the Trainer.
            **batch: `labels` (B, T), the LLaVA's inputs, and what the auxiliary losses prepared.

        Returns:
            The weighted sum under `loss`, and each loss without its weight and gradient under `losses`.
        """
        items = None if num_items_in_batch is None else num_items_in_batch.clamp(min=1)  # 0: nothing is supervised
        prepared = {key for auxiliary in self.auxiliary for key in auxiliary.keys}
        inputs = {name: value for name, value in batch.items() if name not in prepared}
        with self._captured_states() as states:
            output = self.model(**inputs, num_items_in_batch=items, use_cache=False)
        losses, weights = {"next_token": output.loss}, {"next_token": 1.0}
        for auxiliary in self.auxiliary:
            zeros = dict.fromkeys(auxiliary.weights, output.loss.new_zeros(()))
            losses |= zeros | auxiliary.loss(states, batch)
            weights |= auxiliary.weights
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        if "pixel_values" not in inputs:
            total = total + 0.0 * self._see_nothing(total)
        return {"loss": total, "losses": {name: value.detach().float() for name, value in losses.items()}}

    def _see_nothing(self, like: Tensor) -> Tensor:
        """Runs the projectors, and a vision tower that is trained, on zeros.

        Without an image they would have no gradient in this process, and others that have some would wait for it.
        """
        core = self.model.model
        total = like.new_zeros(())
        if any(parameter.requires_grad for parameter in core.vision_tower.parameters()):
            total = total + self._tower_output(like)
        for projector in (core.multi_modal_projector, *getattr(core, "teacher_projectors", {}).values()):
            first = next((layer for layer in projector.modules() if isinstance(layer, nn.Linear)), None)
            if first is not None:  # the identity has none
                total = total + projector(like.new_zeros(1, 1, first.in_features, dtype=first.weight.dtype)).sum()
        return total

    def _tower_output(self, like: Tensor) -> Tensor:
        """Sums what the projector reads of the vision tower's output for an image of zeros."""
        core, layer = self.model.model, feature_layer(self.model.config)
        channels = getattr(self.model.config.vision_config, "num_channels", 3)
        pixels = like.new_zeros(1, channels, *image_size(self.model.config))
        states = core.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        return torch.stack([states[one].sum() for one in ([layer] if isinstance(layer, int) else layer)]).sum()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Lists tied weights once; safetensors refuses to write them twice."""
        state = super().state_dict(*args, **kwargs)
        for name in self._keys_to_ignore_on_save:
            state.pop(kwargs.get("prefix", "") + name, None)
        return state
