"""Segmentation: the last stage of OneFormer's Swin backbone (arXiv:2211.06220), resized to the target grid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, finish, load_model, open_teacher, square_pixels


def load(recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads `OneFormerForUniversalSegmentation`; the target is (grid², channels of the last stage)."""
    from transformers import OneFormerForUniversalSegmentation

    source, config = open_teacher(recipe, "seg", ["oneformer"])
    prepare, _ = square_pixels(source, recipe.revision)
    model = load_model(OneFormerForUniversalSegmentation, source, "seg", revision=recipe.revision).to(device)

    def encode(pixels: Tensor) -> Tensor:
        feature = model.model.pixel_level_module.encoder(pixels).feature_maps[-1]  # type: ignore[union-attr,operator]
        side = recipe.grid or min(feature.shape[-1], PAPER_GRID)
        if side != feature.shape[-1]:
            feature = F.interpolate(feature, size=(side, side), mode="bilinear", align_corners=False)
        return feature.flatten(2).transpose(1, 2)

    return finish("seg", recipe, source, config, model, prepare, encode)
