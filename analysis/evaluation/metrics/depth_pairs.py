"""Relative depth: which of two points is closer, as DA-2K asks (Depth Anything V2, arXiv:2406.09414, sec. 6)."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.evaluation.scorer import Reference, Row
from probing.data.coco import ImageList, Skipped
from probing.data.da2k import Pair, read_pairs
from probing.data.dataloader import Prepared
from probing.data.image_modes import image_size, orientation
from probing.teachers import Teacher, depth
from probing.utils.errors import UserError
from probing.utils.paths import is_file


def score_pairs(depth: NDArray[np.floating], pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Scores one map.

    Args:
        depth: (rows, columns) at the image's own size; larger is closer.
        pairs: of that image.

    Returns:
        Per pair: 1 where the closer point has the larger value, 0.5 where both are equal, else 0. A constant map
        therefore scores one half.
    """
    near = np.array([depth[pair.closer] for pair in pairs])
    far = np.array([depth[pair.farther] for pair in pairs])
    return np.where(near > far, 1.0, np.where(near == far, 0.5, 0.0))


def row_score(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """What the image row alone scores: the point further down is taken for the closer one."""
    return np.array([0.5 + 0.5 * np.sign(pair.closer[0] - pair.farther[0]) for pair in pairs])


def pair_accuracy(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of pairs that are right, from sums (…, 2) of scores and of numbers of pairs."""
    return totals[..., 0] / totals[..., 1]


logger = logging.getLogger(__name__)


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
