"""LLaVA-OneVision in the format of transformers: LLaVA-NeXT's tiles, downscaled if there are too many."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401
from probing.models import llava, llava_next
from probing.models.llava import describe as describe
from probing.models.llava_next import TiledInputs
from probing.models.llava_next import read_config as read_config
from probing.recipe import BackboneRecipe

MODEL_TYPE = "llava_onevision"


class OneVisionInputs(TiledInputs):
    """Images → `Batch`, as `TiledInputs`."""

    def pack(self, features: list[Tensor], sizes: Tensor, newline: Tensor) -> Any:
        """Arranges features (patches, tokens, C) of each image as the model does."""
        from transformers import LlavaOnevisionModel

        model: Any = SimpleNamespace(config=self.config)
        return LlavaOnevisionModel.pack_image_features(
            model, features, sizes, image_newline=newline, vision_aspect_ratio=self.config.vision_aspect_ratio
        )


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> TiledInputs:
    """Builds the input side of a checkpoint; see `probing.models.llava_next.make_inputs`."""
    return llava_next.make_inputs(source, config, recipe, OneVisionInputs)


load = llava.loader(make_inputs)
