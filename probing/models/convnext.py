"""Vision towers that transformers has no LLaVA for: ConvNeXt as open_clip publishes it, a trunk of timm."""

import re
from typing import Any

import torch
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import CLIPVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from probing.utils.errors import UserError

STRIDE = 32
CONVNEXT = {"CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup": "convnext_xxlarge"}
"""Architectures in timm, by the name of the published tower; checkpoints add the resolution: `…-res768`."""


class ConvNextTower(nn.Module):
    """Stem and stages of a ConvNeXt; positions of its last stage are the image tokens (arXiv:2412.09585, sec. 5.1).

    It has the interface of a LLaVA's CLIP tower.
    """

    def __init__(self, architecture: str) -> None:
        import timm

        super().__init__()
        trunk: Any = timm.create_model(architecture, pretrained=False, num_classes=0, global_pool="")
        self.stem, self.stages, self.norm_pre = trunk.stem, trunk.stages, trunk.norm_pre

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Pixels (B, 3, S, S) → features (B, (S / 32)², C), as the only hidden state."""
        pixel_values = pixel_values.to(next(self.parameters()).dtype)
        features = self.norm_pre(self.stages(self.stem(pixel_values))).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))


def convnext_of(name: str, config: dict[str, Any]) -> tuple[str, int] | None:
    """Returns architecture and resolution of a ConvNeXt tower; None for another tower.

    Args:
        name: last part of the tower's path; `-res768` at its end is the resolution.
        config: `config.json` of its folder, in timm's format; may be empty.
    """
    base, _, resolution = name.partition("-res")
    architecture = config.get("architecture", CONVNEXT.get(base, ""))
    if "convnext" not in architecture:
        return None
    size = config.get("pretrained_cfg", {}).get("input_size", [3, 256, 256])[-1]
    side = int(resolution) if re.fullmatch(r"\d+", resolution) else int(size)
    if side % STRIDE:
        raise UserError(f"vision tower {name}: resolution {side} is no multiple of {STRIDE}; give another tower")
    return architecture, side


def stand_in(architecture: str, side: int) -> Any:
    """Returns the smallest CLIP configuration with a ConvNeXt's width and grid, to build transformers' LLaVA."""
    import timm

    with torch.device("meta"):
        trunk: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
    return CLIPVisionConfig(
        hidden_size=trunk.num_features, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
        image_size=side, patch_size=STRIDE,
    )  # fmt: skip
