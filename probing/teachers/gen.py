"""Generation: the image embedding that conditions unCLIP (arXiv:2204.06125), and the image generation pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from probing.recipe import TeacherRecipe
from probing.teachers.base import Pixels, Teacher, build_teacher, load_model, open_teacher
from probing.teachers.registry import CATALOGUE
from probing.utils.errors import UserError, first_line
from probing.utils.pretrained import locate

ENTRY = {
    "default_id": "stabilityai/stable-diffusion-2-1-unclip",
    "class_name": "CLIPVisionModelWithProjection",
    "target": "projected image embedding, one token, not normalised",
    "licences": {"stabilityai/stable-diffusion-2-1-unclip": "CreativeML Open RAIL++-M"},
}
STEPS, GUIDANCE = 25, 10.0
"""Steps of the paper's decoding (OLA-VLM, arXiv:2412.09585), and the pipeline's own default guidance."""


def _is_pipeline(source: str, revision: str | None) -> bool:
    """Whether the image encoder is in a sub-folder of a diffusers pipeline."""
    if Path(source).is_dir():
        return (Path(source) / "model_index.json").exists()
    from transformers.utils import cached_file

    try:
        return cached_file(source, "model_index.json", revision=revision) is not None
    except OSError:
        return False


def load(recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads `CLIPVisionModelWithProjection`, alone or from an unCLIP pipeline; the target is (1, width)."""
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    if recipe.grid is not None:
        raise UserError("teachers.gen has one token and no grid; leave out teachers.gen.grid")
    pipeline = _is_pipeline(locate(recipe.id, "gen teacher"), recipe.revision)
    encoder, extractor = ("image_encoder", "feature_extractor") if pipeline else ("", "")
    source = open_teacher(recipe, "gen", ["clip_vision_model", "clip"], subfolder=encoder)
    source = replace(source, config=getattr(source.config, "vision_config", source.config))
    try:
        processor = AutoImageProcessor.from_pretrained(source.location, revision=recipe.revision, subfolder=extractor)
    except (OSError, ValueError) as error:
        raise UserError(f"gen teacher {recipe.id} has no preprocessing: {first_line(error)}") from None
    model = load_model(CLIPVisionModelWithProjection, source, device, subfolder=encoder)

    def encode(pixels: Tensor) -> Tensor:
        return model(pixels).image_embeds[:, None]

    if Path(source.location).is_dir():
        source = replace(source, location=str(Path(source.location) / encoder))
    return build_teacher(source, model, Pixels(processor), encode, CATALOGUE["gen"].licences)


@dataclass
class GenDecoder:
    """Generates images from image embeddings with unCLIP.

    Attributes:
        pipeline: `StableUnCLIPImg2ImgPipeline`; its scheduler is replaced by DPM-Solver++ (arXiv:2211.01095).
        steps: of the solver.
        guidance: weight of classifier-free guidance; 1 is none and takes half the time.
    """

    pipeline: Any
    steps: int = STEPS
    guidance: float = GUIDANCE

    def __post_init__(self) -> None:
        from diffusers import DPMSolverMultistepScheduler

        self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls, teacher: Teacher, recipe: TeacherRecipe, steps: int = STEPS, guidance: float = GUIDANCE
    ) -> "GenDecoder":
        """Loads the pipeline around a loaded teacher; half precision on a GPU.

        Raises:
            UserError: diffusers is not installed, or the teacher is not a pipeline whose parts fit each other.
        """
        try:
            from diffusers import StableUnCLIPImg2ImgPipeline
            from diffusers.utils import logging as diffusers_logging
        except ImportError:
            raise UserError("decoding gen needs diffusers; type: pip install 'mllm-probing[decode]'") from None
        if not transformers_logging.is_progress_bar_enabled():
            diffusers_logging.disable_progress_bar()
        source = locate(recipe.id, "gen teacher")
        if not _is_pipeline(source, recipe.revision):
            raise UserError(
                f"gen teacher {recipe.id} has no decoder; give the whole unCLIP pipeline, with model_index.json"
            )
        device = next(teacher.model.parameters()).device
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        try:
            pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
                source, revision=recipe.revision, dtype=dtype, image_encoder=teacher.model, use_safetensors=True
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"gen teacher {recipe.id} is not an unCLIP pipeline: {first_line(error)}") from None
        wanted = pipeline.unet.config.projection_class_embeddings_input_dim
        if wanted != 2 * teacher.shape[1]:
            raise UserError(
                f"the decoder of gen teacher {recipe.id} takes embeddings of width {(wanted or 0) // 2} and its "
                f"encoder gives {teacher.shape[1]}: they are of two models; use the published pipeline"
            )
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name != "image_encoder":
                part.to(device)
        return cls(pipeline, steps, guidance)

    @torch.no_grad()
    def decode(self, embeds: Tensor, seeds: Sequence[int]) -> NDArray[np.uint8]:
        """Generates images.

        Args:
            embeds: (B, D), probe outputs or targets.
            seeds: of the noise, one per image; the noise is the same on every device and in every batch.

        Returns:
            (B, S, S, 3), RGB.
        """
        unet = self.pipeline.unet
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self.pipeline(
            prompt=[""] * len(embeds),
            image_embeds=embeds.to(device=unet.device, dtype=unet.dtype),
            generator=noise,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            output_type="np",
        ).images
        return (images * 255).round().astype(np.uint8)
