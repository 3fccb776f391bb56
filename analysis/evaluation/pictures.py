"""Pictures of what the decoders make of each layer's predictions, for the grids of the report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from analysis.evaluation.metrics.generated_images import image_seeds
from analysis.evaluation.scorer import Reference, Row
from probing.data.coco import ImageList
from probing.data.dataloader import Prepared
from probing.teachers import Teacher, depth
from probing.teachers.gen import GenDecoder
from probing.teachers.seg import SegDecoder, label_map, replace_early
from probing.utils.images import square

SIDE = 256
"""Longest side of a stored picture; smaller where the model itself sees less."""


@dataclass(frozen=True)
class Context:
    """What one batch is drawn with: photographs (B, S, S, 3), pixels per teacher, and seeds of the noise."""

    photographs: Tensor
    pixels: dict[str, Tensor]
    seeds: list[int]


Draw = Callable[[Tensor, Context], Tensor]
"""Prediction (B, N, D) and context → pictures (B, S, S) or (B, S, S, 3)."""


@dataclass
class Pictures:
    """Decodes a few images at every layer.

    Attributes:
        images: which.
        teachers: one, whose decoder draws.
        draw: made by `draw_depth`, `draw_seg` or `draw_gen`.
        side: of the pictures, in pixels.
        made_with: what the decoder was told, as text.
    """

    images: ImageList
    teachers: dict[str, Teacher]
    draw: Draw
    side: int
    made_with: str = ""
    summed: frozenset[str] = frozenset()

    @property
    def stem(self) -> str:
        """One file per teacher."""
        return f"pictures/{next(iter(self.teachers))}"

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """One; segmentation is drawn from the probe alone."""
        return [("picture", "blind" if teacher == "seg" else "strict")]

    def settings(self) -> str:
        """The images, and how they are drawn."""
        return f"{self.images.digest()} {self.side} {self.made_with}"

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> Context:
        """The photographs as the models see them, pixels for the true stages of seg, and seeds for gen."""
        size = (self.side, self.side)
        squares = [square(self.images.read(index)) for index in prepared.indices]
        small = np.stack([np.asarray(s.resize(size, Image.Resampling.LANCZOS)) for s in squares])
        seeds = image_seeds([self.images.names[index] for index in prepared.indices])
        return Context(torch.from_numpy(small), prepared.pixels, seeds)

    def score(self, teacher: str, prediction: Tensor, context: Context) -> Iterable[Row]:
        """What the teacher's decoder makes of a prediction."""
        yield "picture", self.measures(teacher)[0][1], self.draw(prediction, context)

    def references(self, targets: dict[str, Tensor], context: Context) -> Iterable[Reference]:
        """The target feature through the same decoder, and the photographs."""
        for name, target in targets.items():
            yield name, "target", "teacher", self.score(name, target, context)
            yield name, "photograph", "teacher", [("picture", self.measures(name)[0][1], context.photographs)]


def draw_depth(teacher: Teacher, side: int) -> Draw:
    """Draws depth maps (B, S, S), float16, in the teacher's own unit; larger is nearer."""

    def draw(prediction: Tensor, context: Context) -> Tensor:
        maps = depth.decode(teacher, prediction)[:, None].float()
        return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)[:, 0].half()

    return draw


def draw_seg(decoder: SegDecoder, means: list[Tensor], side: int) -> Draw:
    """Draws label maps (B, S, S), uint8, with a constant in place of the image's own early stages."""

    def draw(prediction: Tensor, context: Context) -> Tensor:
        stages = decoder.stages(context.pixels["seg"])
        scores = decoder.decode(prediction, replace_early(stages, "blind", means))
        return torch.stack([label_map(one, (side, side)) for one in scores]).to(torch.uint8)

    return draw


def draw_gen(decoder: GenDecoder, side: int) -> Draw:
    """Draws images (B, S, S, 3), uint8, painted from the same noise at every layer."""

    def draw(prediction: Tensor, context: Context) -> Tensor:
        painted = [Image.fromarray(one) for one in decoder.decode(prediction[:, 0], context.seeds)]
        small = [np.asarray(one.resize((side, side), Image.Resampling.LANCZOS)) for one in painted]
        return torch.from_numpy(np.stack(small))

    return draw
