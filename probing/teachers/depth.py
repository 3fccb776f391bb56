"""Depth: the last backbone feature of Depth Anything (arXiv:2406.09414)."""

from typing import Any

import torch
from torch import Tensor

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, build_teacher, load_model, open_teacher, square_pixels
from probing.teachers.registry import CATALOGUE

ENTRY = {
    "default_id": "depth-anything/Depth-Anything-V2-Large-hf",
    "class_name": "DepthAnythingForDepthEstimation",
    "target": "last backbone feature without class token; grid x grid tokens, at most 24 x 24",
    "licences": {
        "depth-anything/Depth-Anything-V2-Large-hf": "CC-BY-NC-4.0 (no commercial use)",
        "depth-anything/Depth-Anything-V2-Base-hf": "CC-BY-NC-4.0 (no commercial use)",
        "depth-anything/Depth-Anything-V2-Small-hf": "Apache-2.0",
    },
}


def load(recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads `DepthAnythingForDepthEstimation`; the target is (grid², width of the backbone)."""
    from transformers import DepthAnythingForDepthEstimation

    source = open_teacher(recipe, "depth", ["depth_anything"])
    patch = source.config.backbone_config.patch_size
    _, size = square_pixels(source)
    prepare, _ = square_pixels(source, patch * (recipe.grid or min(size // patch, PAPER_GRID)))
    model = load_model(DepthAnythingForDepthEstimation, source, device)

    def encode(pixels: Tensor) -> Tensor:
        return model.backbone(pixels).feature_maps[-1][:, 1:]  # type: ignore[operator]

    return build_teacher(source, model, prepare, encode, CATALOGUE["depth"].licences)


def larger_is_nearer(teacher: Teacher) -> bool:
    """Whether the teacher predicts disparity (relative Depth Anything) and not metric depth."""
    config: Any = teacher.model.config
    return config.depth_estimation_type != "metric"


@torch.no_grad()
def decode(teacher: Teacher, features: Tensor) -> Tensor:
    """Decodes features to depth maps with the teacher's neck and head.

    One feature is used for all four inputs of the neck, as OLA-VLM decodes its probes (arXiv:2412.09585, sec. 3).

    Args:
        teacher: a depth teacher.
        features: (B, N, D), a probe's output or the target itself.

    Returns:
        (B, S, S), larger is nearer; negative metres if the teacher is metric.
    """
    model: Any = teacher.model
    assert teacher.grid is not None
    features = features.to(model.device)
    class_token = features.new_zeros(len(features), 1, features.shape[-1])  # the neck drops it
    states = [torch.cat((class_token, features), dim=1)] * len(model.config.neck_hidden_sizes)
    return _nearer_is_larger(teacher, model.head(model.neck(states, *teacher.grid), *teacher.grid))


@torch.no_grad()
def predict(teacher: Teacher, pixels: Tensor) -> Tensor:
    """Computes the teacher's depth maps (B, S, S) from all four of its features; larger is nearer, as in `decode`."""
    model: Any = teacher.model
    return _nearer_is_larger(teacher, model(pixels.to(model.device)).predicted_depth)


def _nearer_is_larger(teacher: Teacher, maps: Tensor) -> Tensor:
    return maps if larger_is_nearer(teacher) else -maps
