"""Depth: the last backbone feature of Depth Anything (arXiv:2406.09414)."""

import torch
from torch import Tensor

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, finish, load_model, open_teacher, square_pixels


def load(recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads `DepthAnythingForDepthEstimation`; the target is (grid², width of the backbone)."""
    from transformers import DepthAnythingForDepthEstimation

    source, config = open_teacher(recipe, "depth", ["depth_anything"])
    patch = config.backbone_config.patch_size
    prepare, own_size = square_pixels(source, recipe.revision)
    grid = recipe.grid or min(own_size // patch, PAPER_GRID)
    if grid * patch != own_size:
        prepare, _ = square_pixels(source, recipe.revision, size=grid * patch)
    model = load_model(DepthAnythingForDepthEstimation, source, "depth", revision=recipe.revision).to(device)

    def encode(pixels: Tensor) -> Tensor:
        return model.backbone(pixels).feature_maps[-1][:, 1:]  # type: ignore[operator]

    return finish("depth", recipe, source, config, model, prepare, encode)
