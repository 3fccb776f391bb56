"""Mean intersection over union from one confusion matrix over a whole split."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.evaluation.scorer import Reference, Row
from probing.data.coco import ImageList, Skipped
from probing.data.dataloader import Prepared
from probing.data.instances import LabelledImages, fitting
from probing.data.panoptic import Panoptic, read_panoptic
from probing.teachers import Teacher
from probing.teachers.seg import SegDecoder, label_map, replace_early
from probing.utils.errors import UserError
from probing.utils.images import square


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """Counts pixels by true and predicted class, on the device of the maps.

    Args:
        truth: (rows, columns) classes; anything outside 0 … classes - 1 is unlabeled.
        found: (rows, columns) predicted classes; anything outside is a prediction of no class.
        classes: number of classes.

    Returns:
        Pixels, (classes + 1, classes + 1): a row per true class and one for unlabeled pixels, a column per predicted
        class and one for no class.

    Raises:
        ValueError: the maps have different sizes.
    """
    if truth.shape != found.shape:
        raise ValueError(f"truth has {tuple(truth.shape)} pixels and the prediction {tuple(found.shape)}")
    true, predicted = (
        torch.where((labels >= 0) & (labels < classes), labels.long(), classes) for labels in (truth, found)
    )
    flat = torch.bincount((true * (classes + 1) + predicted).flatten(), minlength=(classes + 1) ** 2)
    return flat.view(classes + 1, classes + 1)


def class_counts(matrix: Tensor) -> Tensor:
    """What one image adds to a split's IoU: (3 · classes) pixels in both, in the truth, and in the prediction.

    Unlabeled pixels are left out, of truth and prediction alike.
    """
    labelled = matrix[:-1]
    return torch.cat([labelled.diagonal(), labelled.sum(dim=1), labelled.sum(dim=0)[:-1]])


def class_iou(totals: NDArray[np.floating]) -> NDArray[np.float64]:
    """IoU per class (…, classes), from sums (…, 3 · classes) of `class_counts`; NaN for a class that is nowhere."""
    both, true, found = np.split(np.asarray(totals, dtype=np.float64), 3, axis=-1)
    union = true + found - both
    return np.divide(both, union, out=np.full_like(union, np.nan), where=union > 0)


def mean_iou(totals: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean of `class_iou` over the classes that occur in the truth (…); NaN where none does."""
    there = np.split(totals, 3, axis=-1)[1] > 0
    number = there.sum(axis=-1).astype(np.float64)
    total = np.where(there, class_iou(totals), 0.0).sum(axis=-1)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def paper_iou(matrix: Tensor) -> Tensor:
    """Mean IoU of one image as OLA-VLM's released evaluation computes it (protocol `paper`).

    The mean is over the classes of this image's truth, and what is predicted on unlabeled pixels counts in the union.

    Args:
        matrix: of one image, from `confusion`.

    Returns:
        A number, 0 where the truth has no class.
    """
    matrix = matrix.double()
    both, true, found = matrix.diagonal()[:-1], matrix[:-1].sum(dim=1), matrix.sum(dim=0)[:-1]
    there = true > 0
    return (both[there] / (true + found - both)[there]).sum() / there.sum().clamp(min=1)


logger = logging.getLogger(__name__)
MEAN_OVER = 256
"""Training images whose early stages give the constant of blind decoding."""


@dataclass
class Segmentation:
    """Mean IoU over a split, from decoded class scores."""

    images: ImageList
    teachers: dict[str, Teacher]
    decoder: SegDecoder
    panoptic: Panoptic
    protocols: Sequence[str]
    means: list[Tensor]
    stem: str = "scores/miou"
    summed: frozenset[str] = frozenset({"confusion"})

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """Each protocol, with the confusion matrix that any variant can be computed from."""
        return [(metric, protocol) for protocol in self.protocols for metric in ("miou", "confusion")]

    def settings(self) -> str:
        """The images and what is known of their segments."""
        truth = repr([self.panoptic.segments[name] for name in self.images.names])
        return hashlib.sha256(f"{self.images.digest()} {truth}".encode()).hexdigest()

    @classmethod
    def of(
        cls,
        root: Path,
        images: ImageList,
        teachers: dict[str, Teacher],
        decoder: SegDecoder,
        means: list[Tensor],
        protocols: Sequence[str],
        limit: int | None,
    ) -> "Segmentation":
        """Takes the images of a split that have panoptic annotations of their size; the others are left out and named.

        Raises:
            UserError: there are no annotations, their classes are not the teacher's, or no labelled image is left.
        """
        panoptic = read_panoptic(root, images.split)
        if len(panoptic.names) != len(decoder.names):
            raise UserError(
                f"{root} has {len(panoptic.names)} classes and the seg teacher {len(decoder.names)}; mIoU needs a "
                "teacher of the same classes"
            )
        there = {name: (panoptic.folder / png).is_file() for name, (png, _) in panoptic.segments.items()}
        names = [name for name in images.names if there.get(name)]
        left_out = [
            Skipped(name, images.split, "no panoptic PNG" if name in there else "no panoptic annotation")
            for name in images.names
            if not there.get(name)
        ]
        if left_out:
            first = left_out[0]
            logger.warning("%d images have no panoptic truth, first %s (%s)", len(left_out), first.image, first.reason)
        if not names:
            raise UserError(f"no image of {images.split} has a panoptic annotation with its PNG; unpack them there")
        if not any(panoptic.segments[name][1] for name in names[:limit]):
            raise UserError(f"no image of {images.split} has a labelled segment; check {root / 'annotations'}")
        fit = fitting(replace(images, names=names[:limit], skipped=left_out), panoptic)
        chosen = LabelledImages(**vars(fit), maps=panoptic)
        return cls(chosen, {"seg": teachers["seg"]}, decoder, panoptic, protocols, means)

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> tuple[list[Any], list[Tensor]]:
        """True label maps, and the true stages of the backbone."""
        truths = []
        for name in (self.images.names[index] for index in prepared.indices):
            try:
                truths.append(self.panoptic.labels(name))
            except OSError as error:
                raise UserError(f"the panoptic PNG of {name} cannot be read ({error}); unpack it again") from None
        return truths, self.decoder.stages(prepared.pixels["seg"])

    def score(self, teacher: str, prediction: Tensor, context: tuple[list[Any], list[Tensor]]) -> Iterator[Row]:
        """Decodes once per protocol and counts pixels per class."""
        truths, stages = context
        for protocol in self.protocols:
            scores = self.decoder.decode(prediction, replace_early(stages, protocol, self.means))
            yield from self._rows(protocol, scores, truths)

    def references(self, targets: dict[str, Tensor], context: Any) -> Iterator[Reference]:
        """The target feature through the same decoder, and the teacher as it is."""
        yield "seg", "target", "teacher", self.score("seg", targets["seg"], context)
        yield "seg", "teacher", "teacher", self._rows("strict", self.decoder.predict(context[1]), context[0])

    def _rows(self, protocol: str, scores: Tensor, truths: list[Any]) -> Iterator[Row]:
        count = paper_iou if protocol == "paper" else class_counts
        matrices = []
        for one, truth in zip(scores, truths, strict=True):
            true = torch.from_numpy(truth).to(one.device)
            matrices.append(confusion(true, label_map(one, truth.shape), len(self.panoptic.names)))
        yield "miou", protocol, torch.stack([count(matrix) for matrix in matrices])
        yield "confusion", protocol, torch.stack(matrices)


def early_means(decoder: SegDecoder, training: ImageList, batch: int = 8) -> list[Tensor]:
    """Mean (C) over training images and places of every early stage; images that cannot be read are passed over."""
    totals: list[Tensor] = []
    count = 0
    for first in range(0, min(len(training), MEAN_OVER), batch):
        pictures = []
        for index in range(first, min(first + batch, len(training), MEAN_OVER)):
            with contextlib.suppress(OSError):
                pictures.append(square(training.read(index)))
        if pictures:
            sums = [m.mean((2, 3)).sum(0) for m in decoder.stages(decoder.teacher.prepare(pictures))[:-1]]
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
            count += len(pictures)
    if not count:
        raise UserError(f"no image of {training.split} could be read; check {training.folder}")
    return [total / count for total in totals]
