"""Pictures of every layer's predictions, as the teachers decode them, for the report."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from analysis.evaluation.context import EvaluationContext
from analysis.evaluation.generated_images.generation import image_seeds
from analysis.evaluation.registry import EvaluationBatch, Recorder, Series
from probing.teachers import depth
from probing.teachers.seg import label_map, replace_early
from probing.utils.files import disk_errors, write_text
from probing.utils.images import square

SIDE = 256
"""Longest side of a stored picture; smaller if the teacher's input is."""
LANCZOS = Image.Resampling.LANCZOS


class Inputs(NamedTuple):
    """Photographs (B, S, S, 3), and a seed of the noise for each."""

    photographs: Tensor
    seeds: list[int]


class Pictures(Recorder):
    """Decodes a few images at every layer through one teacher's decoder."""

    protocol = "strict"

    def __init__(self, context: EvaluationContext, teacher: str) -> None:
        self.context, self.stem = context, f"pictures/{teacher}"
        self.images = replace(context.images, names=context.images.names[: context.options.pictures])
        self.teachers = {teacher: context.teachers[teacher]}
        self.side = min(SIDE, self.teachers[teacher].prepare([Image.new("RGB", (SIDE, SIDE))]).shape[-1])
        self.series = [("picture", self.protocol)]
        self.settings = f"{self.images.digest()} {self.side} {self.decoder_settings()}"

    def decoder_settings(self) -> str:
        """Returns what else the pictures depend on."""
        return ""

    @abstractmethod
    def decode(self, prediction: Tensor, batch: EvaluationBatch) -> Tensor:
        """Decodes predictions (B, N, D) to pictures (B, S, S) or (B, S, S, 3)."""

    def prepare(self, batch: EvaluationBatch) -> Inputs:
        """Reads the photographs, square as the models see them."""
        squares = [square(self.images.read(index)).resize((self.side, self.side), LANCZOS) for index in batch.indices]
        return Inputs(torch.from_numpy(np.stack([np.asarray(one) for one in squares])), image_seeds(batch.names))

    def update(self, teacher: str, prediction: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        """Decodes a prediction."""
        return {self.series[0]: self.decode(prediction, batch)}

    def references(self, teacher: str, batch: EvaluationBatch) -> Iterator[tuple[str, str, dict[Series, Tensor]]]:
        """Yields the decoded target and the photographs."""
        yield "target", "teacher", self.update(teacher, batch.targets[teacher], batch)
        yield "photograph", "teacher", {self.series[0]: batch.extra.photographs}


class DepthPictures(Pictures):
    """Depth maps (B, S, S), float16, in the teacher's unit; larger is nearer."""

    def decoder_settings(self) -> str:
        """Returns the direction of the teacher's values."""
        return "" if depth.larger_is_nearer(self.teachers["depth"]) else "metric"

    def decode(self, prediction: Tensor, batch: EvaluationBatch) -> Tensor:
        """Decodes maps."""
        maps = depth.decode(self.teachers["depth"], prediction)[:, None].float()
        return F.interpolate(maps, size=(self.side, self.side), mode="bilinear", align_corners=False)[:, 0].half()


class SegPictures(Pictures):
    """Label maps (B, S, S), uint8, decoded blindly."""

    protocol = "blind"

    def __init__(self, context: EvaluationContext, teacher: str) -> None:
        super().__init__(context, teacher)
        with disk_errors(context.run.path):  # the report names the classes
            write_text(context.run.path / "pictures" / "classes.json", json.dumps(context.seg_decoder.names))

    def decode(self, prediction: Tensor, batch: EvaluationBatch) -> Tensor:
        """Decodes label maps."""
        decoder = self.context.seg_decoder
        stages = replace_early(decoder.stages(batch.pixels["seg"]), "blind", self.context.early_means)
        maps = [label_map(one, (self.side, self.side)) for one in decoder.decode(prediction, stages)]
        return torch.stack(maps).to(torch.uint8)


class GenPictures(Pictures):
    """Images (B, S, S, 3), uint8, generated from the same noise at every layer."""

    def decoder_settings(self) -> str:
        """Returns the options of the diffusion."""
        return f"{self.context.options.steps} {self.context.options.guidance}"

    def decode(self, prediction: Tensor, batch: EvaluationBatch) -> Tensor:
        """Generates images."""
        images = self.context.gen_decoder.decode(prediction[:, 0], batch.extra.seeds)
        small = [np.asarray(Image.fromarray(one).resize((self.side, self.side), LANCZOS)) for one in images]
        return torch.from_numpy(np.stack(small))


PICTURES: dict[str, type[Pictures]] = {"depth": DepthPictures, "seg": SegPictures, "gen": GenPictures}
"""By teacher."""
