"""Any vision encoder that transformers or timm loads, as a teacher without decoder: its patches, or its pooled output.

What is no patch is left out: class tokens and registers, which stand before the patches. Images are squashed to the
square that the encoder's own processor ends in, and never cropped, so that a patch shows the place that it stands for.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Pixels, Teacher, finish, on_grid, pixel_side, squared
from probing.utils.checkpoint_files import loading, tensor_shapes
from probing.utils.errors import BROKEN, UserError, first_line
from probing.utils.pretrained import load_config, locate, pretrained

LEADING = 2
"""Most tokens before the patches besides registers: class and distillation token (DeiT, arXiv:2012.12877)."""


def load(name: str, recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads an encoder; the target is (grid², width), or (1, width) with `features: pooled`.

    Args:
        name: any.
        recipe: where it comes from, and what of it is wanted.
        device: where to put it.

    Raises:
        UserError: it is no vision encoder, has no image processor, is incomplete, or its features have no square grid.
    """
    what = f"{name} teacher"
    if recipe.grid == 1:
        raise UserError(f"teachers.{name}.grid=1 leaves no places; give 2 or more, or features=pooled")
    source = locate(recipe.id, what)
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code, "revision": recipe.revision}
    config = load_config(source, what, f"teachers.{name}.trust_remote_code", **trust)
    own = _vision_part(config)
    model_class = _model_class(own, what, recipe)
    prepare, side = _pixels(source, recipe.id, own, trust)
    if hasattr(model_class, "main_input_name"):  # a class of transformers' own, which does not know the field
        del trust["trust_remote_code"]
    model = _load(model_class, source, own, what, device, **trust)

    def encode(pixels: Tensor) -> Tensor:
        output = model(**_inputs(pixels, own))
        if recipe.features == "pooled":
            return _pooled(output, what)
        return on_grid(_places(output, model, what), recipe.grid or PAPER_GRID, recipe.grid is not None)

    _try(encode, side, device, what, model)
    licences = {recipe.id: licence} if (licence := getattr(own, "pretrained_cfg", {}).get("license")) else {}
    return finish(name, recipe, source, config, model, prepare, encode, licences)


def _vision_part(config: Any) -> Any:
    """The configuration of the encoder inside that of a model of images and text."""
    own = getattr(config, "vision_config", None) or config
    if own.model_type == "timm_wrapper":  # timm writes the number of classes there, which the wrapper sets itself
        own.model_args = {key: value for key, value in (own.model_args or {}).items() if key != "num_classes"}
    return own


def _model_class(config: Any, what: str, recipe: TeacherRecipe) -> Any:
    """The class of a configuration.

    Raises:
        UserError: it does not take images alone.
    """
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if recipe.trust_remote_code and getattr(config, "auto_map", None):
        return AutoModel
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    reads = getattr(model_class, "main_input_name", "")
    if reads != "pixel_values" or getattr(config, "is_encoder_decoder", False):
        found = f"{model_class.__name__} reads {reads}" if model_class else "transformers has no encoder of that type"
        found = "its features are answers to queries and no places" if reads == "pixel_values" else found
        raise UserError(
            f"{recipe.id} cannot be the {what}: model type {config.model_type!r}, {found}; give a vision encoder"
        )
    return model_class


def _pixels(source: str, shown: str, config: Any, trust: dict[str, Any]) -> tuple[Pixels, int]:
    """The encoder's own preprocessing, squashed to a square, and the side of that."""
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(source, **trust)
    except (*BROKEN, ImportError) as error:
        said = "no image processor (preprocessor_config.json)" if "image processor" in str(error) else first_line(error)
        raise UserError(f"{shown} cannot be a teacher of images: {said}") from None
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
    elif config.model_type.startswith("siglip2"):  # as many patches as it takes, in a square
        side = values["patch_size"] * math.isqrt(values["max_num_patches"])
        values["size"] = {"height": side, "width": side}
    side = pixel_side(values, shown)
    return squared(values, side), side


def _load(model_class: Any, source: str, config: Any, what: str, device: torch.device, **kwargs: Any) -> nn.Module:
    """Loads the encoder in float32; what the folder lacks is not a number, so that it cannot be used unnoticed.

    Of a model of images and text only the encoder is built, whatever its tensors are called there.
    """
    with loading(f"{what} {source}"):
        model, missing, _ = pretrained(model_class, source, config, device, torch.float32, **kwargs)
        names = set(model.state_dict())
        if missing and missing >= set(dict(model.named_parameters())):
            prefix = _prefix(names, list(tensor_shapes(source, kwargs["revision"])))
            renamed = {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
            model, missing, _ = pretrained(model_class, source, config, device, torch.float32, **renamed, **kwargs)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in missing:
                    parameter.fill_(torch.nan)
    frozen: nn.Module = model.eval().requires_grad_(False).to(device)
    return frozen


def _prefix(wanted: set[str], there: list[str]) -> str:
    """What stands before the names of an encoder's tensors in a larger model; empty where it is not in there."""
    longest = max(wanted, key=len)
    found = {name.removesuffix(longest) for name in there if name.endswith(longest)}
    return next((prefix for prefix in found if all(prefix + name in there for name in wanted)), "")


def _inputs(pixels: Tensor, config: Any) -> dict[str, Any]:
    """Arguments of a forward pass; SigLIP 2 without fixed size takes patches (arXiv:2502.14786)."""
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


def _pooled(output: Any, what: str) -> Tensor:
    """The encoder's own pooled output (B, 1, D)."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise UserError(f"{what}: this encoder has no pooled output; set features=patches")
    return pooled.flatten(1)[:, None]


def _places(output: Any, model: Any, what: str) -> Tensor:
    """The features of the patches as a square map (B, D, side, side).

    A side cannot be mistaken: numbers of tokens that differ by one or two are not both squares.
    """
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise UserError(f"{what}: {type(model).__name__} gives no features of places (no last_hidden_state)")
    inner = getattr(model, "timm_model", None)
    if states.ndim == 4:
        last = getattr(inner, "output_fmt", "NCHW") == "NHWC" or states.shape[2] != states.shape[3]
        states = states.permute(0, 3, 1, 2) if last else states
        rows, columns = states.shape[-2:]
        if rows != columns or rows < 2:
            raise UserError(f"{what}: a grid of {rows} x {columns} is no square of places; set features=pooled")
        return states
    tokens = states.shape[1] if states.ndim == 3 else 0
    registers = getattr(model.config, "num_register_tokens", None) or 0
    prefixes = [n + registers for n in range(LEADING + 1)] if inner is None else [inner.num_prefix_tokens]
    for prefix in prefixes:
        side = math.isqrt(max(tokens - prefix, 0))
        if side > 1 and side * side == tokens - prefix:
            return states[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    raise UserError(
        f"{what}: {type(model).__name__} gives features of shape {tuple(states.shape)}, which are no square grid of "
        "patches; set features=pooled, or choose another encoder"
    )


def _try(encode: Any, side: int, device: torch.device, what: str, model: nn.Module) -> None:
    """Raises UserError where an encoder cannot read a square image, or reads it in another way each time."""
    pixels = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side).to(device)
    try:
        with torch.no_grad():
            first, second = encode(pixels), encode(pixels)
    except (*BROKEN, RuntimeError) as error:
        raise UserError(
            f"{what}: {type(model).__name__} does not take images of {side} x {side} pixels: {first_line(error)}"
        ) from None
    if device.type != "meta" and not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UserError(f"{what}: {type(model).__name__} gives other features each time; choose another encoder")
