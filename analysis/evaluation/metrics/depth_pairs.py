"""Relative depth: which of two points is closer, as DA-2K asks (Depth Anything V2, arXiv:2406.09414, sec. 6)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.evaluation.registry import EvaluationBatch, Metric, MetricInfo, Series, register
from probing.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from analysis.evaluation.context import EvaluationContext
    from analysis.evaluation.options import Options
    from analysis.evaluation.scores import ScoreFile
    from probing.data.coco import ImageList
    from probing.data.da2k import Pair

logger = logging.getLogger(__name__)

SPLIT = "da2k"


def score_pairs(depth: Tensor, pairs: Tensor) -> Tensor:
    """Scores one map.

    Args:
        depth: (rows, columns) at the image's original size; larger is closer.
        pairs: (n, 2, 2), row and column of the closer and of the farther point.

    Returns:
        (n), 1 where the closer point has the larger value, 0.5 where both are equal, else 0; a constant map
        therefore scores one half.
    """
    import torch

    near, far = depth[pairs[..., 0], pairs[..., 1]].unbind(dim=-1)
    return torch.where(near > far, 1.0, torch.where(near == far, 0.5, 0.0))


def row_score(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Scores the guess that the point further down in the image is the closer one."""
    import numpy as np

    return np.array([0.5 + 0.5 * np.sign(pair.closer[0] - pair.farther[0]) for pair in pairs])


def pair_accuracy(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divides summed scores by summed numbers of pairs, (…, 2) → (…)."""
    return totals[..., 0] / totals[..., 1]


@register
class DepthPairs(Metric):
    """Accuracy on pairs of points, from decoded depth maps."""

    name = "da2k"
    help = "accuracy on pairs of points, from decoded depth"
    teacher = "depth"
    requires = ("da2k",)
    infos = (
        MetricInfo(
            "da2k",
            "strict",
            "DA-2K accuracy",
            "Share of point pairs ordered correctly. The depth teacher's neck and head decode the predicted feature; "
            "the point with the larger value is the closer one, at the image's original size. Ties count half, so a "
            "constant scores one half.",
            chance=0.5,
            statistic=pair_accuracy,
            column=2,
        ),
    )

    def __init__(self, context: EvaluationContext) -> None:
        """Reads images and pairs; what cannot be used is skipped and named.

        Raises:
            UserError: the folder is broken, or no image can be used.
        """
        from probing.data.da2k import read_pairs
        from probing.teachers import depth

        super().__init__(context)
        root = Path(context.options.da2k or "")
        self.images, self.pairs, self.sizes = read_images(root, read_pairs(root), context.options.images)
        direction = "" if depth.larger_is_nearer(self.teachers["depth"]) else " metric"
        text = f"{self.images.digest()} {[self.pairs[name] for name in self.images.names]}{direction}"
        self.settings = hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def count_images(cls, options: Options, images: ImageList) -> tuple[int, str]:
        """Counts the annotated images."""
        from probing.data.da2k import read_pairs

        cls.require_options(options)
        return len(list(read_pairs(Path(options.da2k or "")))[: options.images]), SPLIT

    def prepare(self, batch: EvaluationBatch) -> tuple[list[Tensor], Tensor]:
        """Returns the pairs of each image as `score_pairs` takes them, and their numbers (B)."""
        import torch

        device = batch.targets[self.teacher].device
        points = [[(pair.closer, pair.farther) for pair in self.pairs[name]] for name in batch.names]
        counts = torch.tensor([float(len(pairs)) for pairs in points], device=device)
        return [torch.tensor(pairs, device=device) for pairs in points], counts

    def update(self, teacher: str, prediction: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        """Decodes a feature and scores the pairs."""
        from probing.teachers import depth

        return self._scores(depth.decode(self.teachers[teacher], prediction), batch)

    def references(self, teacher: str, batch: EvaluationBatch) -> Iterator[tuple[str, str, dict[Series, Tensor]]]:
        """Scores the decoded target, the teacher's own depth, and the image row alone."""
        import torch

        from probing.teachers import depth

        yield "target", "teacher", self.update(teacher, batch.targets[teacher], batch)
        own = depth.predict(self.teachers[teacher], batch.pixels[teacher])
        yield "teacher", "teacher", self._scores(own, batch)
        rows = [row_score(self.pairs[name]) for name in batch.names]
        yield "image_row", "baseline", {("da2k", "strict"): torch.tensor([[row.sum(), len(row)] for row in rows])}

    def finish(self, scores: ScoreFile) -> None:
        """Warns if near and far look swapped."""
        warn_if_inverted(scores)

    def _scores(self, maps: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        import torch
        from torch.nn.functional import interpolate

        totals, (points, counts) = [], batch.extra
        for depth_map, name, pairs in zip(maps.float(), batch.names, points, strict=True):
            full = interpolate(depth_map[None, None], size=self.sizes[name], mode="bilinear", align_corners=False)
            totals.append(score_pairs(full[0, 0], pairs).sum())
        return {("da2k", "strict"): torch.stack([torch.stack(totals), counts], dim=1)}


def warn_if_inverted(scores: ScoreFile) -> None:
    """Warns if the depth teacher's own maps order the pairs worse than chance."""
    from analysis.evaluation.scores import summaries

    own = {key: values for key, values in scores.table.items() if key.probe == "teacher"}
    for row in summaries(replace(scores, table=own), [0]):
        if row.interval.high < 0.5:
            logger.warning(
                "da2k: the depth teacher itself scores %.2f, below chance: near and far look swapped; check "
                "depth_estimation_type in its config.json",
                row.interval.value,
            )


def read_images(
    root: Path, pairs: dict[str, list[Pair]], limit: int | None
) -> tuple[ImageList, dict[str, list[Pair]], dict[str, tuple[int, int]]]:
    """Selects usable images; those that are missing, and pairs outside their image, are skipped and named.

    Returns:
        The images, the pairs of each, and (rows, columns) of those whose size can be read.

    Raises:
        UserError: no image can be used.
    """
    from probing.data.coco import ImageList, Skipped
    from probing.data.image_modes import size_of_image
    from probing.utils.paths import is_file

    annotated = {name: some for name, some in pairs.items() if some}
    pairs = {name: some for name, some in annotated.items() if is_file(root / name)}
    missing = [Skipped(name, SPLIT, "missing") for name in annotated if name not in pairs]
    if not pairs:
        raise UserError(f"none of the {len(annotated)} images that {root / 'annotations.json'} names exists; copy them")
    if missing:
        logger.warning("da2k: %d of %d images are missing, first %s", len(missing), len(annotated), missing[0].image)
    turned = find_upright(root, pairs)
    sizes: dict[str, tuple[int, int]] = {}
    outside: list[Skipped] = []
    for name in list(pairs)[:limit]:
        try:
            width, height = size_of_image(root / name, name in turned)
        except OSError:
            continue  # the data loader reports it as corrupt
        sizes[name] = (height, width)
        inside = [pair for pair in pairs[name] if pair.inside(height, width)]
        if number := len(pairs[name]) - len(inside):
            outside.append(Skipped(name, SPLIT, f"{number} pairs outside its {width} x {height} pixels"))
        pairs[name] = inside
    names = [name for name in list(pairs)[:limit] if pairs[name]]
    if outside:
        first = outside[0]
        logger.warning("da2k: %d images have points outside, first %s: %s", len(outside), first.image, first.reason)
        if not names:
            raise UserError(f"{root / first.image} has {first.reason}, and so have all; use the published images")
    unusable = [skip for skip in outside if not pairs[skip.image]]
    return ImageList(root, SPLIT, names, missing + unusable, turned=turned), pairs, sizes


def find_upright(root: Path, pairs: dict[str, list[Pair]]) -> frozenset[str]:
    """Returns the images to rotate by EXIF: all that have it, if points lie inside one of them only when rotated."""
    from probing.data.image_modes import orientation, size_of_image

    rotated, upright = [], False
    for name, points in pairs.items():
        try:
            if orientation(root / name) == 1:
                continue
            stored, shown = size_of_image(root / name, upright=False), size_of_image(root / name)
        except OSError:
            continue
        rotated.append(name)
        fits = [all(pair.inside(*size[::-1]) for pair in points) for size in (stored, shown)]
        upright |= fits == [False, True]
    if rotated:
        how = "rotated by it" if upright else "read as stored: no point is outside"
        logger.warning("da2k: %d images with an EXIF orientation are %s, first %s", len(rotated), how, rotated[0])
    return frozenset(rotated if upright else ())
