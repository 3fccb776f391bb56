"""How many tokens one image becomes, on both sides of a LLaVA: features of its tower, placeholders of its processor."""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import _disable_current_modes

import probing.utils.torchvision_shim  # noqa: F401
from probing.utils.errors import UserError

CANNOT_RUN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What models raise that cannot take their inputs."""


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower hands to the projector for one image, or for one tile.

    Attributes:
        grid: rows and columns of the tower's patches.
        extra: class and register tokens before the patches; negative where the first patches are dropped.
    """

    grid: tuple[int, int]
    extra: int

    @property
    def count(self) -> int:
        """All tokens."""
        return self.grid[0] * self.grid[1] + self.extra


def sides(size: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))


def select_strategy(config: Any) -> Literal["default", "full"]:
    """Whether the first feature of the tower is dropped (`default`), as VipLLaVA always does, or kept (`full`)."""
    return "full" if getattr(config, "vision_feature_select_strategy", None) == "full" else "default"


def feature_layer(config: Any) -> int | list[int]:
    """Which layers of the tower are read; VipLLaVA called them `vision_feature_layers` until transformers 5.23."""
    layer = getattr(config, "vision_feature_layer", None)
    layer = config.vision_feature_layers if layer is None else layer
    return layer if isinstance(layer, int) else list(layer)


def image_features(config: Any, size: tuple[int, int]) -> ImageFeatures:
    """Runs the vision half of a LLaVA on shapes alone: what counts is what transformers itself makes of an image.

    Args:
        config: of the checkpoint.
        size: height and width of the pixels.

    Raises:
        UserError: transformers cannot run this tower on such pixels, or its tokens are no grid.
    """
    count = _count_features(config, size)
    dropped = select_strategy(config) == "default"
    patch = getattr(config.vision_config, "patch_size", None)
    rows, columns = (side // one for side, one in zip(size, sides(patch or 1), strict=True))
    if patch is None or count < rows * columns - dropped:  # a tower that merges patches
        rows = columns = math.isqrt(count + dropped)
        if count not in (rows * columns, rows * columns - dropped):
            raise UserError(
                f"the vision tower gives {count} tokens for {size[0]} x {size[1]} pixels, which are no grid"
            )
    return ImageFeatures((rows, columns), count - rows * columns)


def _count_features(config: Any, size: tuple[int, int]) -> int:
    from transformers import LlamaConfig, LlavaConfig

    vision, layer = copy.deepcopy(config.vision_config), feature_layer(config)
    chosen = [layer] if isinstance(layer, int) else layer
    blocks = getattr(vision, "num_hidden_layers", None)
    if blocks is not None and not all(-blocks - 1 <= one <= blocks for one in chosen):
        raise UserError(
            f"config.json: vision_feature_layer is {layer}; the vision tower has layers {-blocks - 1} to {blocks}"
        )
    if "num_hidden_layers" in vision.to_dict() and not hasattr(vision, "depths"):
        vision.num_hidden_layers = 1  # all have as many tokens
        chosen = [0 if one == 0 else -1 for one in chosen]
    llm = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    half = LlavaConfig(
        vision_config=vision, text_config=llm, vision_feature_layer=chosen[0] if isinstance(layer, int) else chosen,
        vision_feature_select_strategy=select_strategy(config),
    )  # fmt: skip
    pixels = getattr(vision, "num_channels", 3), *size
    try:
        with contextlib.suppress(*CANNOT_RUN):
            return _count_on(half, pixels, "meta")
        return _count_on(half, pixels, "cpu")  # some towers look at numbers
    except CANNOT_RUN as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"config.json: transformers cannot run this vision tower with vision_feature_layer={layer} on "
            f"{size[0]} x {size[1]} pixels ({reason})"
        ) from None


def _count_on(config: Any, pixels: tuple[int, ...], device: str) -> int:
    from transformers import LlavaModel

    with _disable_current_modes(), torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = LlavaModel(config).eval()
        return int(model.get_image_features(torch.zeros(1, *pixels)).pooler_output[0].shape[0])


def match_processor(
    processor: Any,
    config: Any,
    features: ImageFeatures,
    size: tuple[int, int],
    counts: Callable[[], list[tuple[int, int]]],
    written: Mapping[str, Any],
) -> None:
    """Makes a processor place as many image tokens as the model has features.

    Fields that the folder does not state are filled in where they are needed; those that it states are never changed.

    Args:
        processor: the checkpoint's own; completed in place.
        config: of the checkpoint.
        features: of one image or tile.
        size: height and width of its pixels.
        counts: image tokens that the processor places, and features of the model, of some images.
        written: `processor_config.json`.

    Raises:
        UserError: the numbers differ; names the fields that are wrong, and the values they should have.
    """

    def differ() -> tuple[int, int] | None:
        try:
            return next((pair for pair in counts() if pair[0] != pair[1]), None)
        except TypeError:  # a processor that computes with a field that is not there
            return 0, features.count

    dropped = select_strategy(config) == "default"
    right: dict[str, Any] = {"vision_feature_select_strategy": select_strategy(config)}
    if hasattr(processor, "num_image_tokens"):
        right |= {"num_image_tokens": features.count + dropped}
    else:
        right |= {"patch_size": size[0] // features.grid[0], "num_additional_image_tokens": features.extra + dropped}
    if hasattr(processor, "vision_aspect_ratio"):
        right |= {"vision_aspect_ratio": config.vision_aspect_ratio}
        if "vision_aspect_ratio" not in written:  # its default may count alike for small images only
            processor.vision_aspect_ratio = config.vision_aspect_ratio
    if differ() is None:
        return
    for name, value in right.items():
        if written.get(name) is None:
            setattr(processor, name, value)
    wrong = differ()
    if wrong is None:
        return
    placed, wanted = wrong
    advice = [f"{name}={value}" for name, value in right.items() if getattr(processor, name) != value]
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if not advice and pinpoints != getattr(processor.image_processor, "image_grid_pinpoints", None):
        advice = ["image_grid_pinpoints as in config.json"]
    raise UserError(
        f"the processor places {placed} image tokens where the model has {wanted} features; in processor_config.json "
        f"set {' and '.join(advice) or 'the fields that count them'}"
    )


def require_image_token(processor: Any, config: Any, written: Mapping[str, Any]) -> None:
    """Raises UserError where the model takes another token for the image's than the processor writes.

    Args:
        processor: the checkpoint's own.
        config: of the checkpoint.
        written: `config.json`.
    """
    token, number = processor.image_token, config.image_token_id
    own = processor.tokenizer.get_vocab().get(token)
    field = "image_token_id" if "image_token_id" in written else "image_token_index"
    if own is None:
        raise UserError(f"the tokenizer has no token {token!r}; add it as a special token, with the id {number}")
    if own != number:
        raise UserError(f"config.json: {field} is {number}; set it to {own}, the id of {token!r} in the tokenizer")
    rows = config.get_text_config().vocab_size
    if number >= rows:
        raise UserError(
            f"config.json: {field} is {number}, and the LLM has embeddings of ids below {rows}; give a checkpoint with "
            "more"
        )
