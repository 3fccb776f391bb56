"""FID and KID: images painted from every layer's predicted embedding, against the real ones.

Painting is dear, so it stands apart from the pass through the backbone: the pass leaves all embeddings behind, and
the images of one curve after the other are painted from them and kept as features. Whatever is there is not made again.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor, from_numpy

from analysis.evaluation.metrics.frechet import ENOUGH_IMAGES, Gaussian, Jackknife, kernel_distances, sample_spread
from analysis.evaluation.metrics.image_features import Extractor, reference_features
from analysis.evaluation.scorer import Reference, Row
from analysis.evaluation.scores import (
    AVERAGE,
    EMPTY,
    ScoreFile,
    ScoreKey,
    Summary,
    averages_final,
    by_seed,
    finite_images,
    is_averaged,
    pooled,
    write_summaries,
)
from probing.data.coco import ImageList
from probing.data.dataloader import Prepared
from probing.runs.directory import Run
from probing.teachers import Teacher
from probing.teachers.gen import GenDecoder
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, reading, whole_file
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

FEWEST = 4


@dataclass
class Embeddings:
    """Keeps what is predicted for the gen teacher: what images are painted from."""

    images: ImageList
    teachers: dict[str, Teacher]
    stem: str = "embeddings/gen"
    summed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, images: ImageList, teachers: dict[str, Teacher], limit: int | None) -> "Embeddings":
        """Takes the first images of a split.

        Raises:
            UserError: the run has no gen teacher, or there are too few images.
        """
        if "gen" not in teachers:
            raise UserError("generating needs the gen teacher, which this run was made without")
        chosen = replace(images, names=images.names[:limit], skipped=[])
        require_images(len(chosen))
        return cls(chosen, {"gen": teachers["gen"]})

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """One."""
        return [("embedding", "strict")]

    def settings(self) -> str:
        """The images."""
        return self.images.digest()

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> None:
        """Nothing is needed."""

    def score(self, teacher: str, prediction: Tensor, context: None) -> Iterable[Row]:
        """The embedding (B, D) itself."""
        yield "embedding", "strict", prediction[:, 0]

    def references(self, targets: dict[str, Tensor], context: None) -> Iterable[Reference]:
        """The true embedding."""
        yield "gen", "target", "teacher", self.score("gen", targets["gen"], context)


@dataclass(frozen=True)
class Painter:
    """How embeddings become features.

    Attributes:
        decoder: paints.
        extractor: looks at what was painted.
        teacher: hash of the gen teacher's weights.
        batch: images painted at once.
    """

    decoder: GenDecoder
    extractor: Extractor
    teacher: str
    batch: int

    def features(self, embeds: NDArray[np.float32], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Paints images from embeddings (B, D) and returns their features; nothing passes through a file."""
        painted = self.decoder.decode(from_numpy(embeds), seeds)
        return self.extractor.features([Image.fromarray(image) for image in painted])


def feature_folder(run: Path, extractor: Extractor, teacher: str, steps: int, guidance: float) -> Path:
    """Where the features of painted images are kept: its name tells the settings apart."""
    settings = (extractor.identity, extractor.side, steps, guidance)
    digest = hashlib.sha256(f"{teacher} {settings}".encode()).hexdigest()[:12]
    return run / "generated" / f"{extractor.name}-{digest}"


def feature_file(folder: Path, curve: ScoreKey, embeds: NDArray[np.float32]) -> Path:
    """Where the features of one curve's painted images are kept; its name changes with the embeddings."""
    digest = hashlib.sha256(np.ascontiguousarray(embeds).tobytes()).hexdigest()[:12]
    place = "-".join(part for part in (curve.layer, curve.probe, curve.control, str(curve.seed)) if part)
    return folder / f"{place}-{digest}.safetensors"


def score_generation(run: Run, found: ScoreFile, images: ImageList, painter: Painter) -> Path:
    """Paints what is not painted yet, and writes both distances of every curve.

    Args:
        run: the run.
        found: embeddings.
        images: the list that they were made of.
        painter: how to paint.

    Returns:
        The file of the summaries.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the curves that were painted are kept.
    """
    require_images(len(found.names))
    seeds = image_seeds(found.names)
    decoder = painter.decoder
    folder = feature_folder(run.path, painter.extractor, painter.teacher, decoder.steps, decoder.guidance)
    files = {curve: feature_file(folder, curve, embeds) for curve, embeds in found.table.items()}
    todo = [curve for curve in found.table if not files[curve].exists()]
    batches = range(0, len(found.names), painter.batch)
    if todo:
        logger.info(
            "painting %d x %d images, %d steps each; %d curves are there already",
            len(todo),
            len(found.names),
            painter.decoder.steps,
            len(files) - len(todo),
        )
    with (
        Interruption().watch() as interruption,
        Progress("painting", len(todo) * len(batches), unit="batches", show=bool(todo)) as bar,
    ):
        for curve in todo:
            parts = []
            for first in batches:
                chosen = slice(first, first + painter.batch)
                parts += _painted(painter, found.table[curve][chosen], seeds[chosen])
                bar.advance()
                if interruption.asked:
                    raise Interrupted
            features = np.concatenate(parts) if parts else np.zeros((0, 1), dtype=np.float32)
            with disk_errors(run.path), whole_file(files[curve]) as temporary:
                save_file({"features": features}, temporary)
    readable = replace(images, names=found.names)
    real, cached = reference_features(painter.extractor, readable)
    logger.info("features of the %d real images: %s", len(real), "from the cache" if cached else "computed and cached")
    if len(real) < ENOUGH_IMAGES:
        logger.warning("%d images: below %d a Fréchet distance is biased upwards", len(real), ENOUGH_IMAGES)
    by_curve = {curve: _all_rows(_features(file), found.table[curve]) for curve, file in files.items()}
    rows = summarise(run, by_curve, real, painter, found)
    file = run.path / "scores" / f"{painter.extractor.metrics[0]}-{found.split}.json"
    with disk_errors(run.path):
        write_summaries(file, rows)
    return file


def _features(file: Path) -> NDArray[np.float32]:
    with reading(file, "remove it and evaluate again"):
        return load_file(file)["features"]


def _painted(painter: Painter, embeds: NDArray[np.float32], seeds: Sequence[int]) -> list[NDArray[np.float32]]:
    """Features of the images painted from the embeddings that are finite; a list of none where there are none."""
    rows = np.flatnonzero(np.isfinite(embeds).all(axis=1))
    return [painter.features(embeds[rows], [seeds[row] for row in rows.tolist()])] if len(rows) else []


def _all_rows(features: NDArray[np.float32], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features with a row for every embedding; NaN where nothing could be painted."""
    rows = np.full((len(embeds), features.shape[1]), np.nan, dtype=np.float32)
    rows[np.isfinite(embeds).all(axis=1)] = features
    return rows


def require_images(number: int) -> None:
    """Raises UserError where there are fewer images than a covariance without a part of them needs."""
    if number < FEWEST:
        raise UserError(f"a distance between sets of images needs at least {FEWEST} images, not {number}; take more")


def summarise(
    run: Run,
    features: dict[ScoreKey, NDArray[np.float32]],
    real: NDArray[np.float32],
    painter: Painter,
    found: ScoreFile,
) -> list[Summary]:
    """Both distances of every curve from the real images, over the images that could be painted in all its layers."""
    reference = Gaussian.of(real)
    frechet, kernel = painter.extractor.metrics
    rows: list[Summary] = []
    families: dict[tuple[ScoreKey, str], list[NDArray[np.float32]]] = {}
    known: dict[tuple[int, bytes], tuple[Any, Jackknife, NDArray[np.float64]]] = {}

    def distances(stack: NDArray[np.float32], there: NDArray[np.bool_]) -> tuple[Jackknife, NDArray[np.float64]]:
        key = (id(stack), there.tobytes())
        if key not in known:
            own, truth = stack[:, there], real[there]
            jackknife = Jackknife.of(own, reference if there.all() else Gaussian.of(truth))
            known[key] = stack, jackknife, np.mean([kernel_distances(one, truth) for one in own], axis=0)
        return known[key][1:]

    def note(curve: ScoreKey, seed: str, stacks: Sequence[NDArray[np.float32]]) -> None:
        there, place = finite_images(*stacks), (found.split, seed)
        number = int(there.sum())
        images = hashlib.sha256(repr(list(itertools.compress(found.names, there))).encode()).hexdigest()
        if number < FEWEST:
            rows.extend(
                Summary(replace(curve, metric=m), *place, EMPTY, number, images=images) for m in (frechet, kernel)
            )
            return
        jackknives, kernels = zip(*(distances(stack, there) for stack in stacks), strict=True)
        jackknife = Jackknife.mean(jackknives)
        interval = jackknife.interval()
        rows.append(
            Summary(replace(curve, metric=frechet), *place, interval, number, images=images, distances=jackknife)
        )
        spread = sample_spread(np.mean(kernels, axis=0))
        rows.append(Summary(replace(curve, metric=kernel), *place, spread, number, images=images))

    for curve, scores in by_seed(dict(features)).items():
        for seed, stack in pooled(curve, scores, run.recipe.fit.seeds).items():
            note(curve, seed, [stack])
            if is_averaged(curve.layer, averages_final(run.manifest)):
                families.setdefault((replace(curve, layer=AVERAGE), seed), []).append(stack)
    for (curve, seed), stacks in families.items():
        note(curve, seed, stacks)
    return rows


def image_seeds(names: Sequence[str]) -> list[int]:
    """A seed per image from its name, so that every layer, run and selection starts from the same noise."""
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in names]
