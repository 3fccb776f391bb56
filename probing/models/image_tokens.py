"""Counts the tokens of an image in a LLaVA: features of its vision tower, placeholders of its processor."""

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401
from probing.utils.checkpoint_files import read_json_or_empty
from probing.utils.errors import UserError, first_line

CANNOT_RUN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What models raise that cannot take their inputs."""
DEFAULT_SIDE = 448
"""Side in pixels of square images if a configuration states no size."""


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower gives the projector for one image, or for one tile.

    Attributes:
        pixels: height and width of the image.
        grid: rows and columns of the tower's patches.
        extra: number of class and register tokens before the patches; negative if the first patches are dropped.
    """

    pixels: tuple[int, int]
    grid: tuple[int, int]
    extra: int

    @property
    def count(self) -> int:
        """Number of all tokens."""
        return self.grid[0] * self.grid[1] + self.extra


def height_and_width(size: Any) -> tuple[int, int]:
    """Returns height and width of a size that may be one number."""
    return (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))


def image_size(config: Any) -> tuple[int, int]:
    """Returns height and width of the vision tower's images."""
    return height_and_width(getattr(config.vision_config, "image_size", None) or DEFAULT_SIDE)


def tower_grid(config: Any) -> tuple[int, int]:
    """Returns rows and columns of the vision tower's patches for one square image."""
    (height, width), (rows, columns) = image_size(config), height_and_width(config.vision_config.patch_size)
    return height // rows, width // columns


def select_strategy(config: Any) -> Literal["default", "full"]:
    """Returns whether the tower's first feature is dropped (`default`), as VipLLaVA always does, or not (`full`)."""
    return "full" if getattr(config, "vision_feature_select_strategy", None) == "full" else "default"


def feature_layer(config: Any) -> int | list[int]:
    """Returns the layers of the tower that are read; VipLLaVA's field had an `s` until transformers 5.23."""
    layer = getattr(config, "vision_feature_layer", None)
    layer = config.vision_feature_layers if layer is None else layer
    return layer if isinstance(layer, int) else list(layer)


def tower_features(processor: Any, config: Any) -> ImageFeatures:
    """Runs image processor and vision tower on a square image or tile.

    Raises:
        UserError: the tower cannot take the pixels of the image processor, or its tokens are not a grid.
    """
    expected = image_size(config)
    pixels = processor.image_processor(Image.new("RGB", expected[::-1]), return_tensors="pt")["pixel_values"]
    size = int(pixels.shape[-2]), int(pixels.shape[-1])
    try:
        return image_features(config, size)
    except UserError:
        if size == expected:
            raise
        field = "crop_size" if getattr(processor.image_processor, "do_center_crop", False) else "size"
        raise UserError(
            f"the image processor makes {size[0]} x {size[1]} pixels where the vision tower takes {expected[0]} x "
            f"{expected[1]}; set its {field} to that"
        ) from None


def image_features(config: Any, size: tuple[int, int]) -> ImageFeatures:
    """Runs the vision half of transformers' LLaVA, on shapes alone, on an image of some height and width in pixels.

    Raises:
        UserError: transformers cannot run this tower on such pixels, or its tokens are not a grid.
    """
    layer, (height, width) = feature_layer(config), size
    blocks = getattr(config.vision_config, "num_hidden_layers", None)
    layers = [layer] if isinstance(layer, int) else layer
    if blocks is not None and not all(-blocks - 1 <= one <= blocks for one in layers):
        raise UserError(
            f"config.json: vision_feature_layer is {layer}; the vision tower has layers {-blocks - 1} to {blocks}"
        )
    try:
        count = _count_features(config, size)
    except CANNOT_RUN as error:
        raise UserError(
            f"config.json: transformers cannot run this vision tower with vision_feature_layer={layer} on {height} x "
            f"{width} pixels ({first_line(error)})"
        ) from None
    dropped = select_strategy(config) == "default"
    patch = getattr(config.vision_config, "patch_size", None)
    rows, columns = (side // one for side, one in zip(size, height_and_width(patch or 1), strict=True))
    if patch is None or count < rows * columns - dropped:  # a tower that merges patches
        rows = columns = math.isqrt(count + dropped)
        if count not in (rows * columns, rows * columns - dropped):
            raise UserError(f"the vision tower gives {count} tokens for {height} x {width} pixels, which are no grid")
    return ImageFeatures(size, (rows, columns), count - rows * columns)


def _count_features(config: Any, size: tuple[int, int]) -> int:
    """Returns the number of features of one image in a LLaVA with this tower, cut to one layer, and a tiny LLM."""
    from transformers import LlamaConfig, LlavaConfig, LlavaModel

    vision, layer = copy.deepcopy(config.vision_config), feature_layer(config)
    layers = [layer] if isinstance(layer, int) else layer
    if "num_hidden_layers" in vision.to_dict() and not hasattr(vision, "depths"):
        vision.num_hidden_layers = 1  # all have the same number of tokens
        layers = [0 if one == 0 else -1 for one in layers]
    llm = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    half = LlavaConfig(
        vision_config=vision, text_config=llm, vision_feature_layer=layers[0] if isinstance(layer, int) else layers,
        vision_feature_select_strategy=select_strategy(config),
    )  # fmt: skip

    def count(device: str) -> int:
        with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
            pixels = torch.zeros(1, getattr(vision, "num_channels", 3), *size)
            return int(LlavaModel(half).eval().get_image_features(pixels).pooler_output[0].shape[0])

    with contextlib.suppress(*CANNOT_RUN):
        return count("meta")
    return count("cpu")  # some towers look at numbers


def match_processor(inputs: Any, features: ImageFeatures, source: str, config: Any, revision: str | None) -> None:
    """Makes a processor write as many image tokens as the model has features.

    Fields that an old folder does not state are filled in, in place; those that it states are never changed.

    Raises:
        UserError: the numbers differ; names the fields that are wrong, and the values that they should have.
    """
    processor, dropped = inputs.processor, select_strategy(config) == "default"
    _require_image_token(processor, config, read_json_or_empty(source, "config.json", revision))
    stated = read_json_or_empty(source, "processor_config.json", revision)
    right: dict[str, Any] = {"vision_feature_select_strategy": select_strategy(config)}
    if hasattr(processor, "num_image_tokens"):
        right["num_image_tokens"] = features.count + dropped
    else:
        right["patch_size"] = features.pixels[0] // features.grid[0]
        right["num_additional_image_tokens"] = features.extra + dropped
    if hasattr(processor, "vision_aspect_ratio"):
        right["vision_aspect_ratio"] = config.vision_aspect_ratio
        if "vision_aspect_ratio" not in stated:  # its default may give the same count for small images only
            processor.vision_aspect_ratio = config.vision_aspect_ratio
    if _find_mismatch(inputs, features, config) is None:
        return
    for name, value in right.items():
        if stated.get(name) is None:
            setattr(processor, name, value)
    if (mismatch := _find_mismatch(inputs, features, config)) is None:
        return
    wrong = [f"{name}={value}" for name, value in right.items() if getattr(processor, name) != value]
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if not wrong and pinpoints != getattr(processor.image_processor, "image_grid_pinpoints", None):
        wrong = ["image_grid_pinpoints as in config.json"]
    raise UserError(
        f"the processor places {mismatch[0]} image tokens where the model has {mismatch[1]} features; in "
        f"processor_config.json set {' and '.join(wrong) or 'the fields that count them'}"
    )


def _find_mismatch(inputs: Any, features: ImageFeatures, config: Any) -> tuple[int, int] | None:
    """Returns numbers of image tokens and of features of the first image for which they differ."""
    processor, (height, width) = inputs.processor, features.pixels
    sizes = [(width, height)]
    if hasattr(config, "image_grid_pinpoints"):
        sizes += [(2 * width, height), (width, 3 * height), (2 * width, 2 * height)]
    for size in sizes:
        try:
            encoded = processor(images=[Image.new("RGB", size)], text=[processor.image_token], return_tensors="pt")
        except TypeError:  # a processor that computes with a field that is absent
            return 0, features.count
        tokens = int((encoded["input_ids"] == config.image_token_id).sum())
        if tokens != (expected := inputs.count_features(encoded, 0)):
            return tokens, expected
    return None


def _require_image_token(processor: Any, config: Any, stated: Mapping[str, Any]) -> None:
    """Raises UserError if the model's id of the image token is not that of the token that the processor writes."""
    token, number, rows = processor.image_token, config.image_token_id, config.get_text_config().vocab_size
    own = processor.tokenizer.get_vocab().get(token)
    field = "image_token_id" if "image_token_id" in stated else "image_token_index"
    if own is None:
        raise UserError(f"the tokenizer has no token {token!r}; add it as a special token, with the id {number}")
    if own != number:
        raise UserError(f"config.json: {field} is {number}; set it to {own}, the id of {token!r} in the tokenizer")
    if number >= rows:
        raise UserError(f"config.json: {field} is {number}, but the LLM has {rows} embeddings; give matching weights")
