"""Generation: the image embedding that conditions unCLIP (arXiv:2204.06125)."""

from pathlib import Path

import torch
from torch import Tensor

from probing.errors import UserError
from probing.hub import first_line, locate
from probing.recipe import TeacherRecipe
from probing.teachers.base import Pixels, Teacher, finish, load_model, open_teacher


def _is_pipeline(source: str, revision: str | None) -> bool:
    """Whether the image encoder lives in a sub-folder of a diffusers pipeline."""
    if Path(source).is_dir():
        return (Path(source) / "model_index.json").exists()
    from transformers.utils import cached_file

    try:
        return cached_file(source, "model_index.json", revision=revision) is not None
    except OSError:
        return False


def load(recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads `CLIPVisionModelWithProjection`, on its own or from within an unCLIP pipeline; the target is (1, width)."""
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    pipeline = _is_pipeline(locate(recipe.id, "gen teacher"), recipe.revision)
    encoder, extractor = ("image_encoder", "feature_extractor") if pipeline else ("", "")
    source, config = open_teacher(recipe, "gen", ["clip_vision_model", "clip"], subfolder=encoder)
    try:
        processor = AutoImageProcessor.from_pretrained(source, revision=recipe.revision, subfolder=extractor)
    except (OSError, ValueError) as error:
        raise UserError(f"gen teacher {recipe.id} has no preprocessing: {first_line(error)}") from None
    model = load_model(CLIPVisionModelWithProjection, source, "gen", revision=recipe.revision, subfolder=encoder).to(
        device
    )

    def encode(pixels: Tensor) -> Tensor:
        return model(pixels).image_embeds[:, None]

    weights = str(Path(source) / encoder) if Path(source).is_dir() else source
    return finish("gen", recipe, weights, config, model, Pixels(processor), encode)
