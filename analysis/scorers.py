"""The ways to score predictions: each has its own images, its teacher, and what it does with a predicted feature."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from analysis.depth_pairs import row_score, score_pairs
from analysis.segmentation import class_counts, confusion, paper_iou
from analysis.similarity import centred_cosine, flat_cosine, token_cosine
from probing.data.coco import ImageList, Skipped, image_size, is_file, orientation, square
from probing.data.da2k import Pair, read_pairs
from probing.data.instances import LabelledImages, fitting
from probing.data.loader import Prepared
from probing.data.panoptic import Panoptic, read_panoptic
from probing.errors import UserError
from probing.teachers import Teacher, depth
from probing.teachers.seg import SegDecoder, label_map, replace_early

logger = logging.getLogger(__name__)

Row = tuple[str, str, Tensor]
"""Metric, protocol, and what every image of the batch scores: (B), or (B, numbers)."""
Reference = tuple[str, str, str, Iterable[Row]]
"""Teacher, and the probe and control that `results.csv` names it by."""
MEAN_OVER = 256
"""Training images whose early stages give the constant of blind decoding."""


class Scorer(Protocol):
    """One metric, or several that need the same predictions of the same images.

    Attributes:
        stem: folder and first part of the name of the file that its scores go to.
        images: what is scored.
        teachers: those whose features are predicted.
        summed: metrics of which only the sum over all images is kept.
    """

    images: ImageList
    teachers: dict[str, Teacher]
    summed: frozenset[str]

    @property
    def stem(self) -> str:
        """See above."""

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """Metric and protocol of every row that `score` gives."""

    def settings(self) -> str:
        """What the scores depend on besides the run, as text."""

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> Any:
        """Whatever all predictions for one batch are scored with."""

    def score(self, teacher: str, prediction: Tensor, context: Any) -> Iterable[Row]:
        """Scores a prediction (B, N, D), by a probe or a constant."""

    def references(self, targets: dict[str, Tensor], context: Any) -> Iterable[Reference]:
        """What stands beside the probes: above all the teacher itself.

        Its feature decoded as a prediction is (`target`), and its own answer (`teacher`).
        """


@dataclass
class Cosine:
    """Cosine similarity with the target; see `analysis.similarity`."""

    images: ImageList
    teachers: dict[str, Teacher]
    means: dict[str, Tensor]
    protocols: Sequence[str]
    stem: str = "scores/cosine"
    summed: frozenset[str] = frozenset()

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """Up to three ways to compute it."""
        every = [("cosine", "strict"), ("cosine_centred", "strict"), ("cosine", "paper")]
        return [(metric, protocol) for metric, protocol in every if protocol in self.protocols]

    def settings(self) -> str:
        """The images."""
        return self.images.digest()

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The targets."""
        return targets

    def score(self, teacher: str, prediction: Tensor, context: dict[str, Tensor]) -> Iterator[Row]:
        """One number per image and way to compute it."""
        target, mean = context[teacher], self.means[teacher]
        ways: dict[tuple[str, str], Callable[[], Tensor]] = {
            ("cosine", "strict"): lambda: token_cosine(prediction, target),
            ("cosine_centred", "strict"): lambda: centred_cosine(prediction, target, mean),
            ("cosine", "paper"): lambda: flat_cosine(prediction, target),
        }
        for metric, protocol in self.measures(teacher):
            yield metric, protocol, ways[metric, protocol]()

    def references(self, targets: dict[str, Tensor], context: Any) -> Iterator[Reference]:
        """None: a target's cosine with itself is 1."""
        yield from ()


@dataclass
class DepthPairs:
    """Accuracy on pairs of points, from decoded depth maps."""

    images: ImageList
    teachers: dict[str, Teacher]
    pairs: dict[str, list[Pair]]
    sizes: dict[str, tuple[int, int]]
    stem: str = "scores/da2k"
    summed: frozenset[str] = frozenset()

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """One."""
        return [("da2k", "strict")]

    def settings(self) -> str:
        """The images, their pairs, and the direction of a metric teacher."""
        pairs = repr([self.pairs[name] for name in self.images.names])
        metric = "" if depth.larger_is_nearer(self.teachers["depth"]) else " metric"
        return hashlib.sha256(f"{self.images.digest()} {pairs}{metric}".encode()).hexdigest()

    @classmethod
    def of(cls, root: Path, teachers: dict[str, Teacher], limit: int | None) -> "DepthPairs":
        """Reads a folder in DA-2K's layout; missing images, and pairs outside theirs, are left out and named.

        Raises:
            UserError: the run has no depth teacher, the folder is broken, or no image is left.
        """
        if "depth" not in teachers:
            raise UserError("da2k needs the depth teacher, which this run was made without")
        found = {name: some for name, some in read_pairs(root).items() if some}
        names = [name for name in found if is_file(root / name)]
        missing = [Skipped(name, "da2k", "missing") for name in found if name not in set(names)]
        if not names:
            raise UserError(f"none of the {len(found)} images that {root / 'annotations.json'} names is there")
        if missing:
            logger.warning("da2k: %d of %d images are missing, first %s", len(missing), len(found), missing[0].image)
        turned = _turned_by_points(root, {name: found[name] for name in names})
        sizes: dict[str, tuple[int, int]] = {}
        outside: list[Skipped] = []
        for name in names[:limit]:
            try:
                width, height = image_size(root / name, name in turned)
            except OSError:
                continue  # the loader reads it again, and notes why it is left out
            sizes[name] = (height, width)
            inside = [pair for pair in found[name] if pair.inside(height, width)]
            if len(inside) < len(found[name]):
                number = len(found[name]) - len(inside)
                outside.append(Skipped(name, "da2k", f"{number} pairs outside its {width} x {height} pixels"))
            found[name] = inside
        if outside:
            logger.warning(
                "da2k: points outside %d images are left out, first %s: %s",
                len(outside), outside[0].image, outside[0].reason,
            )  # fmt: skip
        names = [name for name in names[:limit] if found[name]]
        if not names:
            raise UserError(
                f"{root / outside[0].image} has {outside[0].reason}, and so have all; use the published images"
            )
        unusable = [skip for skip in outside if not found[skip.image]]
        images = ImageList(root, "da2k", names, missing + unusable, turned=turned)
        return cls(images, {"depth": teachers["depth"]}, found, sizes)

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> tuple[list[str], Tensor]:
        """Names of the images, and their pixels for the teacher's own answer."""
        return [self.images.names[index] for index in prepared.indices], prepared.pixels["depth"]

    def score(self, teacher: str, prediction: Tensor, context: tuple[list[str], Tensor]) -> Iterator[Row]:
        """Decodes, and counts right pairs and pairs of every image."""
        yield "da2k", "strict", self._counts(depth.decode(self.teachers[teacher], prediction), context[0])

    def references(self, targets: dict[str, Tensor], context: Any) -> Iterator[Reference]:
        """The target feature through the same decoder, the teacher from its four features, and the image row alone."""
        yield "depth", "target", "teacher", self.score("depth", targets["depth"], context)
        own = depth.predict(self.teachers["depth"], context[1])
        yield "depth", "teacher", "teacher", [("da2k", "strict", self._counts(own, context[0]))]
        rows = [row_score(self.pairs[name]) for name in context[0]]
        counts = torch.tensor([[one.sum(), len(one)] for one in rows])
        yield "depth", "image_row", "baseline", [("da2k", "strict", counts)]

    def _counts(self, maps: Tensor, names: list[str]) -> Tensor:
        rows = []
        for one, name in zip(maps.float(), names, strict=True):
            size = self.sizes[name]
            full = torch.nn.functional.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)
            scores = score_pairs(full[0, 0].cpu().numpy(), self.pairs[name])
            rows.append([scores.sum(), len(scores)])
        return torch.tensor(np.array(rows))


def _turned_by_points(root: Path, pairs: dict[str, list[Pair]]) -> frozenset[str]:
    """Finds the images that are turned upright as their EXIF orientation says: all, where points show it of one."""
    turned, upright = [], False
    for name, own in pairs.items():
        try:
            if orientation(root / name) == 1:
                continue
            (width, height), (wide, high) = image_size(root / name, upright=False), image_size(root / name)
        except OSError:
            continue
        turned.append(name)
        upright |= all(pair.inside(high, wide) for pair in own) and not all(pair.inside(height, width) for pair in own)
    if turned:
        how = "turned upright" if upright else "read as stored: no point says otherwise"
        logger.warning("da2k: %d images with an EXIF orientation are %s, first %s", len(turned), how, turned[0])
    return frozenset(turned if upright else ())


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
