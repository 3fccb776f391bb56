"""Loads any vision encoder of transformers, timm or open_clip as a teacher: its patches, or its pooled output.

Class tokens and registers, which precede the patches, are dropped. Images are squashed to the encoder's square and
never cropped, so that patches of all teachers show the same region.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probing.recipe import TeacherRecipe
from probing.teachers import open_clip_encoder
from probing.teachers.base import PAPER_GRID, Pixels, Teacher, TeacherSource, build_teacher, on_grid, square_processor
from probing.utils.checkpoint_files import loading, tensor_shapes
from probing.utils.errors import BROKEN, UserError, first_line
from probing.utils.open_clip_models import is_open_clip
from probing.utils.pretrained import load_config, locate, pretrained

MOST_CLASS_TOKENS = 2
"""Class and distillation token (DeiT, arXiv:2012.12877)."""


def load(name: str, recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads an encoder; the target is (grid², width), or (1, width) with `features: pooled`.

    Raises:
        UserError: it is not a vision encoder, has no image processor, is incomplete, or its patches form no square.
    """
    label = f"{name} teacher"
    if is_open_clip(recipe.id):
        return open_clip_encoder.load(name, recipe, device)
    location = locate(recipe.id, label)
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code, "revision": recipe.revision}
    config = load_config(location, label, f"teachers.{name}.trust_remote_code", **trust)
    config = getattr(config, "vision_config", None) or config
    if config.model_type == "timm_wrapper":  # timm writes the number of classes, which the wrapper sets itself
        config.model_args = {key: value for key, value in (config.model_args or {}).items() if key != "num_classes"}
    source = TeacherSource(name, recipe, location, config)
    model_class = _model_class(source)
    prepare, side = _pixels(source, trust)
    if hasattr(model_class, "main_input_name"):  # a class of transformers, which does not accept the argument
        del trust["trust_remote_code"]
    model = _load_model(model_class, source, device, trust)

    def encode(pixels: Tensor) -> Tensor:
        output = model(**_inputs(pixels, config))
        if recipe.features == "pooled":
            return _pooled(output, label)
        return on_grid(_patch_map(output, model, label), recipe.grid or PAPER_GRID, recipe.grid is not None)

    _require_deterministic(label, model, encode, side)
    licence = getattr(config, "pretrained_cfg", {}).get("license")
    return build_teacher(source, model, prepare, encode, {recipe.id: licence} if licence else {})


def _model_class(source: TeacherSource) -> Any:
    """Returns the class of an encoder; raises UserError if it does not take images alone."""
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    recipe, config = source.recipe, source.config
    if recipe.trust_remote_code and getattr(config, "auto_map", None):
        return AutoModel
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    reads = getattr(model_class, "main_input_name", "")
    if reads == "pixel_values" and not getattr(config, "is_encoder_decoder", False):
        return model_class
    if reads == "pixel_values":
        reason = "its features are answers to queries"
    else:
        reason = f"{model_class.__name__} reads {reads}" if model_class else "unknown to transformers"
    raise UserError(
        f"{recipe.id} cannot be the {source.name} teacher: model type {config.model_type!r}, {reason}; give a vision "
        "encoder"
    )


def _pixels(source: TeacherSource, trust: dict[str, Any]) -> tuple[Pixels, int]:
    """Returns the encoder's preprocessing, squashed to a square, and the side of that."""
    from transformers import AutoImageProcessor

    shown, config = source.recipe.id, source.config
    try:
        processor: Any = AutoImageProcessor.from_pretrained(source.location, **trust)
    except (*BROKEN, ImportError) as error:
        missing = "image processor" in str(error)
        reason = "it has no image processor (preprocessor_config.json)" if missing else first_line(error)
        raise UserError(f"{shown} cannot be a teacher: {reason}; add it") from None
    values = processor.to_dict()
    if (timm_values := getattr(processor, "data_config", None)) is not None:
        from timm.data.transforms import str_to_pil_interp

        _, height, width = timm_values["input_size"]
        values = {
            "image_mean": timm_values["mean"],
            "image_std": timm_values["std"],
            "resample": int(str_to_pil_interp(timm_values["interpolation"])),
            "size": {"height": height, "width": width},
        }
    elif config.model_type.startswith("siglip2"):  # a square of as many patches as it takes
        side = values["patch_size"] * math.isqrt(values["max_num_patches"])
        values["size"] = {"height": side, "width": side}
    return square_processor(values, shown)


def _load_model(model_class: Any, source: TeacherSource, device: torch.device, kwargs: dict[str, Any]) -> nn.Module:
    """Loads the encoder in float32, also from a model of images and text, whatever its tensors are called there.

    Missing parameters become NaN, so that features that depend on them are refused.
    """

    def build(**renamed: Any) -> tuple[Any, set[str]]:
        model, missing, _ = pretrained(
            model_class, source.location, source.config, device, torch.float32, **renamed, **kwargs
        )
        return model, missing

    with loading(f"{source.name} teacher {source.location}"):
        model, missing = build()
        if missing and missing >= set(dict(model.named_parameters())):
            prefix = _prefix(set(model.state_dict()), list(tensor_shapes(source.location, kwargs["revision"])))
            if prefix:
                model, missing = build(key_mapping={f"^{re.escape(prefix)}": ""})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in missing:
                    parameter.fill_(torch.nan)
    frozen: nn.Module = model.eval().requires_grad_(False).to(device)
    return frozen


def _prefix(names: set[str], stored: list[str]) -> str:
    """Returns the prefix of an encoder's tensor names in a larger model; empty if the model does not contain it."""
    longest = max(names, key=len)
    prefixes = {name.removesuffix(longest) for name in stored if name.endswith(longest)}
    return next((prefix for prefix in prefixes if all(prefix + name in stored for name in names)), "")


def _inputs(pixels: Tensor, config: Any) -> dict[str, Any]:
    """Returns the arguments of a forward pass; SigLIP 2 without fixed size takes patches (arXiv:2502.14786)."""
    if not config.model_type.startswith("siglip2"):
        return {"pixel_values": pixels}
    size = config.patch_size
    rows, columns = pixels.shape[-2] // size, pixels.shape[-1] // size
    cut = pixels.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # (B, 3, rows, size, columns, size)
    patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels)),
    }


def _pooled(output: Any, label: str) -> Tensor:
    """Returns the encoder's pooled output (B, 1, D)."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise UserError(f"{label}: this encoder has no pooled output; set features=patches")
    return pooled.flatten(1)[:, None]


def _patch_map(output: Any, model: Any, label: str) -> Tensor:
    """Returns the features of the patches as a square map (B, D, side, side).

    The number of class tokens is unambiguous: numbers of patches that differ by one or two are not both squares.
    """
    states = getattr(output, "last_hidden_state", None)
    timm_model = getattr(model, "timm_model", None)
    if states is not None and states.ndim == 4:
        last = getattr(timm_model, "output_fmt", "NCHW") == "NHWC" or states.shape[2] != states.shape[3]
        states = states.permute(0, 3, 1, 2) if last else states
        if states.shape[-2] == states.shape[-1] > 1:
            return states
    elif states is not None and states.ndim == 3:
        registers = getattr(model.config, "num_register_tokens", None) or 0
        prefixes = [registers + count for count in range(MOST_CLASS_TOKENS + 1)]
        for prefix in prefixes if timm_model is None else [timm_model.num_prefix_tokens]:
            side = math.isqrt(max(states.shape[1] - prefix, 0))
            if side > 1 and side * side == states.shape[1] - prefix:
                return states[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    shape = None if states is None else tuple(states.shape)
    raise UserError(
        f"{label}: features of {type(model).__name__} have shape {shape}, not a square of patches; set features=pooled"
    )


def _require_deterministic(label: str, model: nn.Module, encode: Callable[[Tensor], Tensor], side: int) -> None:
    """Raises UserError if an encoder cannot read a square image, or gives other features the second time."""
    pixels = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side).to(next(model.parameters()).device)
    try:
        with torch.no_grad():
            first, second = encode(pixels), encode(pixels)
    except (*BROKEN, RuntimeError) as error:
        raise UserError(
            f"{label}: {type(model).__name__} rejects images of {side} x {side} pixels: {first_line(error)}; choose "
            "another encoder"
        ) from None
    if not first.is_meta and not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UserError(f"{label}: {type(model).__name__} is not deterministic; choose another encoder")
