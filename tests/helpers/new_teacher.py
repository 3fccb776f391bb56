"""Semantics: SegFormer's (arXiv:2105.15203) class logits on the target grid."""

import torch
from torch import Tensor

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, build_teacher, load_model, on_grid, open_teacher, square_pixels

ENTRY = {
    "default_id": "nvidia/segformer-b5-finetuned-ade-640-640",
    "class_name": "SegformerForSemanticSegmentation",
    "target": "logits on the grid",
    "licences": {"nvidia/segformer-b5-finetuned-ade-640-640": "NVIDIA Source Code License"},
}


def load(recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads `SegformerForSemanticSegmentation`; the target is (grid², classes)."""
    from transformers import SegformerForSemanticSegmentation

    source = open_teacher(recipe, "semantic", ["segformer"])
    prepare, _ = square_pixels(source)
    model = load_model(SegformerForSemanticSegmentation, source, device)

    def encode(pixels: Tensor) -> Tensor:
        return on_grid(model(pixels).logits, recipe.grid or PAPER_GRID, recipe.grid is not None)

    licences: dict[str, str] = dict(ENTRY["licences"])  # type: ignore[call-overload]
    return build_teacher(source, model, prepare, encode, licences)
