"""What the metrics of one evaluation share."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from analysis.evaluation.metrics.segmentation import early_means
from analysis.evaluation.options import Options
from probing.data.coco import ImageList
from probing.data.target_cache import TargetCache
from probing.runs.directory import Run
from probing.teachers import Teacher, load_teachers
from probing.teachers.gen import GenDecoder
from probing.teachers.seg import SegDecoder
from probing.training.run import held_out_images, open_target_caches, training_images


@dataclass
class EvaluationContext:
    """A run, what to evaluate, and decoders that are loaded when a metric first uses them."""

    run: Run
    options: Options
    device: torch.device
    images: ImageList
    teachers: dict[str, Teacher]

    @classmethod
    def load(cls, run: Run, options: Options, device: torch.device) -> "EvaluationContext":
        """Lists the held-out images and loads the teachers."""
        return cls(run, options, device, held_out_images(run.recipe.data), load_teachers(run.recipe.teachers, device))

    @property
    def micro_batch(self) -> int:
        """Images per forward pass."""
        return self.options.micro_batch or self.run.recipe.fit.micro_batch

    @cached_property
    def mean_targets(self) -> dict[str, Tensor]:
        """The training split's mean target (N, D) by teacher."""
        return self.run.mean_targets(self.device)

    @cached_property
    def seg_decoder(self) -> SegDecoder:
        """The decoder of the seg teacher."""
        return SegDecoder.load(self.teachers["seg"], self.run.recipe.teachers["seg"])

    @cached_property
    def early_means(self) -> list[Tensor]:
        """Means of the seg teacher's early stages over training images, for blind decoding."""
        return early_means(self.seg_decoder, training_images(self.run.recipe.data))

    @cached_property
    def gen_decoder(self) -> GenDecoder:
        """The decoder of the gen teacher."""
        recipe, options = self.run.recipe.teachers["gen"], self.options
        return GenDecoder.load(self.teachers["gen"], recipe, options.steps, options.guidance)

    @cached_property
    def target_caches(self) -> dict[str, TargetCache]:
        """Caches of the held-out images' targets."""
        recipe = self.run.recipe.model_copy(deep=True)
        recipe.data.target_cache = self.options.target_cache or recipe.data.target_cache
        return open_target_caches(recipe, self.teachers, self.images)
