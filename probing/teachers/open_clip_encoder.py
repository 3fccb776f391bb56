"""Loads the image tower of any model of open_clip as a teacher without decoder: its patches, or its embedding."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, TeacherSource, build_teacher, on_grid, square_processor
from probing.utils.checkpoint_files import loading
from probing.utils.errors import UserError
from probing.utils.open_clip_models import build_visual, find_open_clip


def load(name: str, recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads an encoder; the target is (grid², width), or (1, embedding) with `features: pooled`.

    Patches are the last map of `forward_intermediates`, normalised as the model does before it pools; pooled features
    are what `encode_image` gives.

    Raises:
        UserError: there is no such model, or its features form no square map.
    """
    from timm.data.transforms import str_to_pil_interp

    if recipe.revision:
        raise UserError(
            f"teachers.{name}.revision: open_clip reads no revisions; download that one, and give its folder"
        )
    found = find_open_clip(recipe.id)
    if found is None:
        raise UserError(f"{recipe.id} has no usable open_clip_config.json; give a model of open_clip")
    if device.type == "meta":
        with loading(found.name), device:
            visual: Any = build_visual(found.model)
    else:
        visual = found.load()
    visual = visual.float().eval().requires_grad_(False).to(device)
    normalised = getattr(visual, "attn_pool", None) is None  # CoCa has a norm of the pooled feature alone

    def encode(pixels: Tensor) -> Tensor:
        if recipe.features == "pooled":
            embedding = visual(pixels)
            return (embedding[0] if isinstance(embedding, tuple) else embedding)[:, None]
        maps = visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=normalised, intermediates_only=True
        )["image_intermediates"]
        if maps[-1].ndim != 4 or maps[-1].shape[-1] != maps[-1].shape[-2]:
            raise UserError(f"{name} teacher: features have shape {tuple(maps[-1].shape)}; set features=pooled")
        return on_grid(maps[-1], recipe.grid or PAPER_GRID, recipe.grid is not None)

    statistics = {
        "image_mean": found.preprocessing["mean"],
        "image_std": found.preprocessing["std"],
        "resample": int(str_to_pil_interp(found.preprocessing["interpolation"])),
    }
    prepare, _ = square_processor(statistics, recipe.id, found.image_size)
    source = TeacherSource(name, recipe, recipe.id, None, _tensors_hash(visual))
    return build_teacher(source, visual, prepare, encode, {recipe.id: found.licence} if found.licence else {})


def _tensors_hash(module: nn.Module) -> str:
    """Hashes names and values of a module's tensors; `no weights` on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            return "no weights"
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"tensors:{digest.hexdigest()}"
