"""FID, KID and their like: images generated from every layer's predicted embedding, compared with the real ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from analysis.evaluation.registry import EvaluationBatch, Metric, MetricInfo, Series, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from analysis.evaluation.context import EvaluationContext
    from analysis.evaluation.generated_images.features import Extractor
    from analysis.evaluation.options import Options
    from analysis.evaluation.scores import ScoreFile

EMBEDDING = ("embedding", "strict")
METHOD = (
    "The gen teacher's unCLIP generates images from the predicted embedding, with the same noise at every layer; real "
    "images are squashed to a square, as the teacher sees them."
)
KERNEL = "Kernel distance of the same features; the range is that of random subsets."
ENOUGH_IMAGES = 2048
"""Width of Inception's features; with fewer images the covariance is singular."""


class GeneratedImages(Metric):
    """Records predicted embeddings; the distances follow once all images have been generated from them."""

    teacher = "gen"
    expensive = True

    def __init__(self, context: EvaluationContext) -> None:
        """Loads the decoder and the network for image features, so that a missing one is reported first.

        Raises:
            UserError: there are too few images, or a network is missing.
        """
        from analysis.evaluation.generated_images.generation import Generator, require_images

        super().__init__(context)
        require_images(len(self.images))
        self.stem, self.series = "embeddings/gen", [EMBEDDING]
        extractor = self.load_extractor(context.options, context.device)
        teacher = self.teachers["gen"].sha256
        self.generator = Generator(context.gen_decoder, extractor, teacher, context.micro_batch)

    @staticmethod
    def downloads(options: Options) -> bool:
        """Whether loading the network downloads it, which planning does not."""
        return False

    @staticmethod
    @abstractmethod
    def load_extractor(options: Options, device: torch.device) -> Extractor:
        """Loads the network whose features are compared."""

    def update(self, teacher: str, prediction: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        """Returns the embeddings (B, D)."""
        return {EMBEDDING: prediction[:, 0]}

    def references(self, teacher: str, batch: EvaluationBatch) -> Iterator[tuple[str, str, dict[Series, Tensor]]]:
        """Yields the true embeddings."""
        yield "target", "teacher", self.update(teacher, batch.targets[teacher], batch)

    def finish(self, scores: ScoreFile) -> None:
        """Generates images and writes the distances."""
        from analysis.evaluation.generated_images.generation import write_distances

        write_distances(self.context.run, scores, self.images, self.generator)


@register
class InceptionDistance(GeneratedImages):
    """FID and KID."""

    name = "fid"
    help = "FID and KID of generated images"
    infos = (
        MetricInfo(
            "fid",
            "strict",
            "FID",
            f"Fréchet distance of Inception features. {METHOD} The interval is a jackknife over groups of images.",
            higher_is_better=False,
            digits=1,
            column=1,
            enough_images=ENOUGH_IMAGES,
        ),
        MetricInfo("kid", "strict", "KID", KERNEL, higher_is_better=False, digits=1),
    )

    @staticmethod
    def downloads(options: Options) -> bool:
        """Whether Inception has to be downloaded."""
        from analysis.evaluation.generated_images.features import inception_file

        return options.inception_weights is None and inception_file() is None

    @staticmethod
    def load_extractor(options: Options, device: torch.device) -> Extractor:
        """Loads Inception."""
        from analysis.evaluation.generated_images.features import inception

        return inception(options.inception_weights, device)


@register
class ClassifierDistance(GeneratedImages):
    """Fréchet and kernel distance with the features of another network."""

    name = "frechet"
    help = "the same distances with features of another network"
    requires = ("extractor",)
    infos = (
        MetricInfo(
            "frechet_*",
            "strict",
            "Fréchet distance ({} features)",
            f"Fréchet distance of features of the named network, which are not Inception's. {METHOD}",
            higher_is_better=False,
            digits=1,
            column=1,
            enough_images=ENOUGH_IMAGES,
        ),
        MetricInfo("kernel_*", "strict", "kernel distance ({} features)", KERNEL, higher_is_better=False, digits=1),
    )

    @staticmethod
    def load_extractor(options: Options, device: torch.device) -> Extractor:
        """Loads an image classifier."""
        from analysis.evaluation.generated_images.features import classifier

        return classifier(str(options.extractor), device)
