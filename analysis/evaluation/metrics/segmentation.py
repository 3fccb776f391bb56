"""Mean intersection over union, from one confusion matrix over a whole split."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from analysis.evaluation.registry import EvaluationBatch, Metric, MetricInfo, Series, register
from probing.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from analysis.evaluation.context import EvaluationContext
    from probing.data.coco import ImageList
    from probing.data.panoptic import Panoptic
    from probing.teachers.seg import SegDecoder

logger = logging.getLogger(__name__)

MEAN_OVER = 256
"""Training images whose early stages are averaged for blind decoding."""
BATCH = 8


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts pixels by true and predicted class, on the device of the maps.

    Args:
        truth: (rows, columns) classes; anything outside 0 … classes - 1 is unlabeled.
        predicted: (rows, columns) classes; anything outside is a prediction of no class.
        classes: number of classes.

    Returns:
        Pixels, (classes + 1, classes + 1): a row per true class and one for unlabeled pixels, a column per predicted
        class and one for no class.

    Raises:
        ValueError: the maps have different sizes.
    """
    import torch

    if truth.shape != predicted.shape:
        raise ValueError(f"truth has {tuple(truth.shape)} pixels and the prediction {tuple(predicted.shape)}")
    row, column = (torch.where((x >= 0) & (x < classes), x.long(), classes) for x in (truth, predicted))
    counts = torch.bincount((row * (classes + 1) + column).flatten(), minlength=(classes + 1) ** 2)
    return counts.view(classes + 1, classes + 1)


def class_counts(matrix: Tensor) -> Tensor:
    """Returns one image's terms of the split's IoU, (3 · classes): pixels in both, in the truth, in the prediction.

    Unlabeled pixels are left out of truth and prediction.
    """
    import torch

    labelled = matrix[:-1]
    return torch.cat([labelled.diagonal(), labelled.sum(dim=1), labelled.sum(dim=0)[:-1]])


def class_iou(totals: NDArray[np.floating]) -> NDArray[np.float64]:
    """Computes IoU per class (…, classes) from sums (…, 3 · classes); NaN for a class that does not occur."""
    import numpy as np

    both, true, predicted = np.split(np.asarray(totals, dtype=np.float64), 3, axis=-1)
    union = true + predicted - both
    return np.divide(both, union, out=np.full_like(union, np.nan), where=union > 0)


def mean_iou(totals: NDArray[np.floating]) -> NDArray[np.float64]:
    """Averages `class_iou` over the classes of the truth (…); NaN if it has none."""
    import numpy as np

    occurs = np.split(totals, 3, axis=-1)[1] > 0
    number = occurs.sum(axis=-1).astype(np.float64)
    total = np.where(occurs, class_iou(totals), 0.0).sum(axis=-1)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def paper_iou(matrix: Tensor) -> Tensor:
    """Computes one image's mean IoU as OLA-VLM's released evaluation does (protocol `paper`).

    The mean is over the classes of this image's truth, and predictions on unlabeled pixels count in the union.

    Args:
        matrix: from `confusion`.

    Returns:
        A number, 0 if the truth has no class.
    """
    matrix = matrix.double()
    both, true, predicted = matrix.diagonal()[:-1], matrix[:-1].sum(dim=1), matrix.sum(dim=0)[:-1]
    occurs = true > 0
    return (both[occurs] / (true + predicted - both)[occurs]).sum() / occurs.sum().clamp(min=1)


@register
class Segmentation(Metric):
    """Mean IoU over a split, from decoded class scores."""

    name = "miou"
    help = "mean IoU of the decoded segmentation"
    teacher = "seg"
    infos = (
        MetricInfo(
            "miou",
            "blind",
            "mIoU, probe alone",
            "The predicted feature replaces the last stage of the seg teacher, whose decoder classifies every pixel; "
            "one confusion matrix over the split, without unlabeled pixels. A constant replaces the image's early "
            "stages.",
            statistic=mean_iou,
            column=3,
        ),
        MetricInfo(
            "miou",
            "strict",
            "mIoU, with the image's true early stages",
            "The same, but the decoder sees the image's true early stages, so that even the mean target scores high.",
            statistic=mean_iou,
        ),
        MetricInfo(
            "miou",
            "paper",
            "mIoU per image, early stages shrunk",
            "Mean over images, with the early stages shrunk, as in the paper's released evaluation.",
        ),
    )
    summed = frozenset({"confusion"})

    def __init__(self, context: EvaluationContext) -> None:
        """Reads panoptic annotations and loads the decoder.

        Raises:
            UserError: annotations are missing, have other classes than the teacher, or label no image.
        """
        from probing.data.panoptic import read_panoptic
        from probing.utils.paths import local_path

        super().__init__(context)
        root = local_path(context.run.recipe.data.path.removeprefix("coco:"))
        self.panoptic, self.decoder = read_panoptic(root, self.images.split), context.seg_decoder
        classes, own = len(self.panoptic.names), len(self.decoder.names)
        if classes != own:
            raise UserError(f"{root} has {classes} classes and the seg teacher {own}; use a teacher of these classes")
        self.images = labelled_images(context.images, self.panoptic, context.options.images)
        self.early_means = context.early_means if "blind" in self.protocols else None
        self.series = [(name, protocol) for protocol in self.protocols for name in ("miou", "confusion")]
        truth = [self.panoptic.segments[name] for name in self.images.names]
        self.settings = hashlib.sha256(f"{self.images.digest()} {truth!r}".encode()).hexdigest()

    def prepare(self, batch: EvaluationBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Reads the true label maps and computes the true stages of the teacher, on its device."""
        import torch

        truths = []
        for name in batch.names:
            try:
                truths.append(torch.from_numpy(self.panoptic.labels(name)).to(self.context.device))
            except OSError as error:
                raise UserError(f"cannot read the panoptic PNG of {name} ({error}); unpack it again") from None
        return truths, self.decoder.stages(batch.pixels["seg"])

    def update(self, teacher: str, prediction: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        """Decodes once per protocol and counts pixels."""
        from probing.teachers.seg import replace_early

        truths, stages = batch.extra
        counts: dict[Series, Tensor] = {}
        for protocol in self.protocols:
            scores = self.decoder.decode(prediction, replace_early(stages, protocol, self.early_means))
            counts |= self._counts(protocol, scores, truths)
        return counts

    def references(self, teacher: str, batch: EvaluationBatch) -> Iterator[tuple[str, str, dict[Series, Tensor]]]:
        """Scores the decoded target and the teacher's own segmentation."""
        truths, stages = batch.extra
        yield "target", "teacher", self.update(teacher, batch.targets[teacher], batch)
        yield "teacher", "teacher", self._counts("strict", self.decoder.predict(stages), truths)

    def _counts(self, protocol: str, scores: Tensor, truths: Sequence[Tensor]) -> dict[Series, Tensor]:
        import torch

        from probing.teachers.seg import label_map

        matrices = []
        for image, truth in zip(scores, truths, strict=True):
            rows, columns = truth.shape
            matrices.append(confusion(truth, label_map(image, (rows, columns)), len(self.panoptic.names)))
        count = paper_iou if protocol == "paper" else class_counts
        return {
            ("miou", protocol): torch.stack([count(matrix) for matrix in matrices]),
            ("confusion", protocol): torch.stack(matrices),
        }


def labelled_images(images: ImageList, panoptic: Panoptic, limit: int | None) -> ImageList:
    """Selects the images with panoptic annotations of their size; the others are skipped and named.

    Raises:
        UserError: no labelled image is left.
    """
    from probing.data.coco import Skipped
    from probing.data.instances import LabelledImages, keep_annotated_size

    exists = {name: (panoptic.folder / png).is_file() for name, (png, _) in panoptic.segments.items()}
    names = [name for name in images.names if exists.get(name)]
    skipped = [
        Skipped(name, images.split, "no panoptic PNG" if name in exists else "no panoptic annotation")
        for name in images.names
        if not exists.get(name)
    ]
    if skipped:
        first = skipped[0]
        logger.warning("%d images have no panoptic truth, first %s (%s)", len(skipped), first.image, first.reason)
    if not names:
        raise UserError(f"no image of {images.split} has a panoptic annotation with its PNG; unpack them there")
    if not any(panoptic.segments[name][1] for name in names[:limit]):
        raise UserError(f"no image of {images.split} has a labelled segment; check annotations/ of the data")
    fit = keep_annotated_size(replace(images, names=names[:limit], skipped=skipped), panoptic)
    return LabelledImages(**vars(fit), maps=panoptic)


def early_means(decoder: SegDecoder, training: ImageList) -> list[Tensor]:
    """Averages every early stage over training images and positions, (C) each; unreadable images are skipped."""
    from probing.utils.images import square

    totals: list[Tensor] = []
    count = 0
    for first in range(0, min(len(training), MEAN_OVER), BATCH):
        pictures = []
        for index in range(first, min(first + BATCH, len(training), MEAN_OVER)):
            with contextlib.suppress(OSError):
                pictures.append(square(training.read(index)))
        if pictures:
            sums = [m.mean((2, 3)).sum(0) for m in decoder.stages(decoder.teacher.prepare(pictures))[:-1]]
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
            count += len(pictures)
    if not count:
        raise UserError(f"no image of {training.split} could be read; check {training.folder}")
    return [total / count for total in totals]
