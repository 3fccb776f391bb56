"""Depth: the last backbone feature of Depth Anything (arXiv:2406.09414)."""

from typing import Any

import torch
from torch import Tensor

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, finish, load_model, open_teacher, square_pixels
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

    source, config = open_teacher(recipe, "depth", ["depth_anything"])
    patch = config.backbone_config.patch_size
    prepare, own_size = square_pixels(source, recipe.revision)
    grid = recipe.grid or min(own_size // patch, PAPER_GRID)
    if grid * patch != own_size:
        prepare, _ = square_pixels(source, recipe.revision, size=grid * patch)
    model = load_model(DepthAnythingForDepthEstimation, source, config, "depth", device, revision=recipe.revision)

    def encode(pixels: Tensor) -> Tensor:
        return model.backbone(pixels).feature_maps[-1][:, 1:]  # type: ignore[operator]

    return finish("depth", recipe, source, config, model, prepare, encode, CATALOGUE["depth"].licences)


def larger_is_nearer(teacher: Teacher) -> bool:
    """Tells disparity, as of relative Depth Anything, from metric depth, whose larger values are farther."""
    config: Any = teacher.model.config
    return config.depth_estimation_type != "metric"


@torch.no_grad()
def decode(teacher: Teacher, features: Tensor) -> Tensor:
    """Depth maps of features, through the teacher's own neck and head.

    One feature stands for all four inputs of the neck, as OLA-VLM decodes its probes (arXiv:2412.09585, sec. 3).

    Args:
        teacher: a depth teacher.
        features: (B, N, D), a probe's output or the target itself.

    Returns:
        (B, S, S), larger is nearer; of a metric teacher negative metres.
    """
    model: Any = teacher.model
    assert teacher.grid is not None
    features = features.to(model.device)
    class_token = features.new_zeros(len(features), 1, features.shape[-1])  # the neck drops it
    states = [torch.cat((class_token, features), dim=1)] * len(model.config.neck_hidden_sizes)
    return _nearer_is_larger(teacher, model.head(model.neck(states, *teacher.grid), *teacher.grid))


@torch.no_grad()
def predict(teacher: Teacher, pixels: Tensor) -> Tensor:
    """Depth maps (B, S, S) of the teacher as it is, from four true features; larger is nearer, as in `decode`."""
    model: Any = teacher.model
    return _nearer_is_larger(teacher, model(pixels.to(model.device)).predicted_depth)


def _nearer_is_larger(teacher: Teacher, maps: Tensor) -> Tensor:
    return maps if larger_is_nearer(teacher) else -maps
