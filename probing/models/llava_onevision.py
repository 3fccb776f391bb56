"""LLaVA-OneVision in the format of transformers: LLaVA-NeXT's tiles, shrunk where there are too many."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401
from probing.models import llava, llava_next
from probing.models.base import Backbone
from probing.models.llava import describe as describe
from probing.models.llava_next import TiledInputs
from probing.recipe import BackboneRecipe

MODEL_TYPE = "llava_onevision"


class OneVisionInputs(TiledInputs):
    """Images → `Batch`, as `TiledInputs`."""

    def pack(self, features: list[Tensor], sizes: Tensor, newline: Tensor) -> Any:
        """The model's arrangement of features (patches, tokens, C) of each image."""
        from transformers import LlavaOnevisionModel

        model: Any = SimpleNamespace(config=self.config)
        return LlavaOnevisionModel.pack_image_features(
            model, features, sizes, image_newline=newline, vision_aspect_ratio=self.config.vision_aspect_ratio
        )


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> TiledInputs:
    """Builds the input side of a checkpoint; see `probing.models.llava_next.make_inputs`."""
    return llava_next.make_inputs(source, config, recipe, OneVisionInputs)


def load(source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None) -> Backbone:
    """Loads the checkpoint; see `probing.models.llava.load`."""
    return llava.load(source, config, recipe, device, random_seed, make_inputs(source, config, recipe))
