"""LLaVA with another projector than transformers' two layers: none (`identity`), `linear`, or a deeper MLP.

The tensors of two layers are called as in transformers' LLaVA; deeper ones continue: `linear_3`, ….
"""

import re
from typing import Any

from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.activations import ACT2FN

from probing.models.llava import describe as describe
from probing.models.llava import load as load
from probing.models.llava import make_inputs as make_inputs
from probing.utils.errors import UserError

MODEL_TYPE = "llava_projector"


class ProjectorConfig(LlavaConfig):
    """A LLaVA's configuration and `projector_depth`, its number of linear layers."""

    model_type = MODEL_TYPE
    projector_depth: int = 2


def projector_depth(kind: str) -> int:
    """Returns the number of linear layers that LLaVA's name of a projector means; raises UserError for other names."""
    if kind in ("identity", "linear"):
        return ("identity", "linear").index(kind)
    if match := re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind):
        return int(match[1])
    raise UserError(f"no projector is called {kind!r}; give linear, mlp2x_gelu, mlp3x_gelu or identity")


class Projector(nn.Module):
    """Linear layers with an activation between them; with none, the features pass unchanged."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        layers = config.vision_feature_layer
        width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        hidden, self.depth = config.text_config.hidden_size, int(config.projector_depth)
        if not self.depth and width != hidden:
            raise UserError(f"identity projector: the tower is {width} wide, the LLM {hidden}; give linear")
        for number in range(1, self.depth + 1):
            layer = nn.Linear(width if number == 1 else hidden, hidden, bias=config.multimodal_projector_bias)
            self.add_module(f"linear_{number}", layer)
        self.act = ACT2FN[config.projector_hidden_act]

    def forward(self, image_features: Tensor) -> Tensor:
        """Features (B, N, C) → image tokens (B, N, H)."""
        for number in range(1, self.depth + 1):
            image_features = image_features if number == 1 else self.act(image_features)
            image_features = getattr(self, f"linear_{number}")(image_features)
        return image_features


class ProjectorModel(LlavaModel):
    """LLaVA without `lm_head`, with any projector."""

    config_class = ProjectorConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.multi_modal_projector: Any = Projector(config)


class ProjectorForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with any projector; subclasses name the class of their model without `lm_head`."""

    config_class = ProjectorConfig
    core_class: type[ProjectorModel] = ProjectorModel

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # LLaVA's own would build a second LLM
        self.model = self.core_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(MODEL_TYPE, ProjectorConfig, exist_ok=True)
AutoModelForImageTextToText.register(ProjectorConfig, ProjectorForConditionalGeneration, exist_ok=True)
