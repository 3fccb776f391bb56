"""Loads the image tower of any model of open_clip as a teacher without decoder: its patches, or its embedding."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, TeacherSource, finish, on_grid, square_processor
from probing.utils.errors import UserError
from probing.utils.open_clip_models import load_open_clip, tensors_hash


def load(name: str, recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads an encoder; the target is (grid², width), or (1, embedding) with `features: pooled`.

    Patches are the last map of `forward_intermediates`, normalised as the model does before it pools; pooled features
    are what `encode_image` gives.

    Raises:
        UserError: there is no such model, or its features form no square map.
    """
    from timm.data.transforms import str_to_pil_interp

    found = load_open_clip(recipe.id, device)
    statistics = {
        "image_mean": found.preprocessing["mean"],
        "image_std": found.preprocessing["std"],
        "resample": int(str_to_pil_interp(found.preprocessing["interpolation"])),
        "size": {"height": found.side, "width": found.side},
    }

    normalised = getattr(found.visual, "attn_pool", None) is None  # CoCa has a norm of the pooled feature alone

    def encode(pixels: Tensor) -> Tensor:
        if recipe.features == "pooled":
            embedding = found.visual(pixels)
            return (embedding[0] if isinstance(embedding, tuple) else embedding)[:, None]
        maps = found.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=normalised, intermediates_only=True
        )["image_intermediates"]
        if maps[-1].ndim != 4 or maps[-1].shape[-1] != maps[-1].shape[-2]:
            raise UserError(f"{name} teacher: features have shape {tuple(maps[-1].shape)}; set features=pooled")
        return on_grid(maps[-1], recipe.grid or PAPER_GRID, recipe.grid is not None)

    prepare, _ = square_processor(statistics, recipe.id)
    source = TeacherSource(name, recipe, recipe.id, SimpleNamespace())
    teacher = finish(source, found.visual, prepare, encode, {recipe.id: found.licence} if found.licence else {})
    return replace(teacher, sha256=tensors_hash(found.visual))
