"""FastVLM (arXiv:2412.13303) in the format of transformers: LLaVA with a tower of timm, a token for 64 x 64 pixels."""

import math
from typing import Any

from probing.models import llava
from probing.recipe import BackboneRecipe

MODEL_TYPE = "fast_vlm"


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> llava.LlavaInputs:
    """Builds the input side of a checkpoint; see `probing.models.llava.make_inputs`."""
    processor = llava.open_processor(source, recipe)
    side = math.isqrt(config.image_seq_length)
    return llava.LlavaInputs(processor, llava.prompt(processor, recipe), config.image_token_id, (side, side))


load = llava.loader(make_inputs)


def describe(config: Any, inputs: llava.LlavaInputs) -> dict[str, Any]:
    """Returns what `probing inspect` shows, from configuration and processor alone."""
    return {
        "family": MODEL_TYPE,
        "llm": llava.describe_llm(config.text_config),
        "vision_tower": {"type": config.vision_config.architecture},
        "prompt": inputs.text,
        "image_grid": list(inputs.grid),
    }
