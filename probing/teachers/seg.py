"""Segmentation: the last stage of OneFormer's Swin backbone (arXiv:2211.06220), resized to the target grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probing.recipe import TeacherRecipe
from probing.teachers.base import PAPER_GRID, Teacher, build_teacher, load_model, on_grid, open_teacher, square_pixels
from probing.teachers.registry import CATALOGUE
from probing.utils.errors import UserError, first_line
from probing.utils.pretrained import locate

ENTRY = {
    "default_id": "shi-labs/oneformer_coco_swin_large",
    "class_name": "OneFormerForUniversalSegmentation",
    "target": "last stage of the backbone, resized to the grid; at most 24 x 24",
    "licences": {"shi-labs/oneformer_coco_swin_large": "MIT"},
}

TASK = "the task is semantic"


def load(recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads `OneFormerForUniversalSegmentation`; the target is (grid², channels of the last stage)."""
    from transformers import OneFormerForUniversalSegmentation

    source = open_teacher(recipe, "seg", ["oneformer"])
    prepare, _ = square_pixels(source)
    model = load_model(OneFormerForUniversalSegmentation, source, device)

    def encode(pixels: Tensor) -> Tensor:
        feature = model.model.pixel_level_module.encoder(pixels).feature_maps[-1]  # type: ignore[union-attr,operator]
        return on_grid(feature, recipe.grid or PAPER_GRID, recipe.grid is not None)

    return build_teacher(source, model, prepare, encode, CATALOGUE["seg"].licences)


class _FixedFeatures(nn.Module):
    """Replaces the backbone and returns given feature maps."""

    def __init__(self, feature_maps: Sequence[Tensor]) -> None:
        super().__init__()
        self.feature_maps = tuple(feature_maps)

    def forward(self, pixel_values: Tensor) -> "_FixedFeatures":
        return self


@dataclass
class SegDecoder:
    """Decodes a last-stage feature to a semantic map with OneFormer.

    Attributes:
        teacher: a seg teacher.
        task: token ids of `TASK`, (1, length).
    """

    teacher: Teacher
    task: Tensor

    @classmethod
    def load(cls, teacher: Teacher, recipe: TeacherRecipe) -> "SegDecoder":
        """Reads the tokenizer of the task; raises UserError if the teacher's folder has none."""
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        source = locate(recipe.id, "seg teacher")
        try:
            # Without this file transformers would silently build a tokenizer without vocabulary.
            cached_file(source, "tokenizer_config.json", revision=recipe.revision)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=recipe.revision)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"seg teacher {recipe.id} has no tokenizer for decoding: {first_line(error)}; use the whole folder"
            ) from None
        model: Any = teacher.model
        length = model.config.task_seq_len
        tokens = tokenizer(TASK, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return cls(teacher, tokens["input_ids"] * tokens["attention_mask"])

    @property
    def names(self) -> list[str]:
        """Class names by label."""
        model: Any = self.teacher.model
        return [name for _, name in sorted(model.config.id2label.items())]

    @torch.no_grad()
    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Computes the backbone's four feature maps (B, C, h, w), finest first."""
        model: Any = self.teacher.model
        return list(model.model.pixel_level_module.encoder(pixels.to(model.device)).feature_maps)

    @torch.no_grad()
    def decode(self, features: Tensor, stages: Sequence[Tensor]) -> Tensor:
        """Computes class scores with a feature in place of the last stage.

        Args:
            features: (B, N, D) on the target grid; resized to the last stage's grid.
            stages: feature maps as `stages` returns them; only the size of the last one matters.

        Returns:
            (B, classes, h, w): per pixel and class the sum over queries of class probability times mask probability.
        """
        assert self.teacher.grid is not None
        last = features.to(stages[-1].device).transpose(1, 2).unflatten(2, self.teacher.grid)
        if last.shape[-2:] != stages[-1].shape[-2:]:
            last = F.interpolate(last, size=stages[-1].shape[-2:], mode="bilinear", align_corners=False)
        return self._scores([*stages[:-1], last])

    @torch.no_grad()
    def predict(self, stages: Sequence[Tensor]) -> Tensor:
        """Computes the teacher's class scores (B, classes, h, w)."""
        return self._scores(stages)

    def _scores(self, stages: Sequence[Tensor]) -> Tensor:
        model: Any = self.teacher.model
        module = model.model.pixel_level_module
        encoder, module.encoder = module.encoder, _FixedFeatures(stages)
        try:
            # The model reads only number and size of these images.
            blank = stages[0].new_zeros(len(stages[0]), 3, *stages[0].shape[-2:])
            output = model(blank, task_inputs=self.task.to(blank.device).expand(len(blank), -1))
        finally:
            module.encoder = encoder
        classes = output.class_queries_logits.softmax(dim=-1)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", classes, output.masks_queries_logits.sigmoid())


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes one image's scores (classes, h, w) to its size and returns the best class: (rows, columns)."""
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)


def replace_early(stages: Sequence[Tensor], protocol: str, means: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Replaces the early stages, through which the decoder sees the image besides the probe's output.

    Args:
        stages: true feature maps (B, C, h, w), finest first.
        protocol: `strict` keeps them; `paper` shrinks them to the size of the last, as OLA-VLM's released evaluation
            does; `blind` uses constants, so that the probe alone is decoded.
        means: constants of `blind`, per early stage the mean (C) over images and positions.

    Returns:
        As many maps, the last one unchanged.
    """
    early, last = list(stages[:-1]), stages[-1]
    if protocol == "paper":
        early = [F.interpolate(m, size=last.shape[-2:], mode="bilinear", align_corners=False) for m in early]
    elif protocol == "blind":
        assert means is not None
        early = [mean.to(m)[None, :, None, None].expand_as(m) for m, mean in zip(early, means, strict=True)]
    return [*early, last]
