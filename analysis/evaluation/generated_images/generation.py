"""Generates images from embeddings and writes the distances of their features from those of real images.

Generating costs most, so it follows the forward pass: the pass stores all embeddings, then the images of one series
after the other are generated and stored as features, and nothing is generated twice.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from analysis.evaluation.generated_images.distances import (
    Gaussian,
    frechet_jackknife,
    kernel_distances,
    subset_spread,
)
from analysis.evaluation.generated_images.features import Extractor, reference_features
from analysis.evaluation.jackknife import Jackknife
from analysis.evaluation.registry import describe
from analysis.evaluation.scores import (
    EMPTY,
    ScoreFile,
    ScoreKey,
    Summary,
    averages_final,
    finite_images,
    seed_stacks,
    write_summaries,
)
from probing.data.coco import ImageList
from probing.runs.directory import Run
from probing.teachers.gen import GenDecoder
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, disk_errors, reading
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

FEWEST = 4


@dataclass(frozen=True)
class Generator:
    """Turns embeddings into features of generated images.

    Attributes:
        decoder: generates images.
        extractor: computes their features.
        teacher: hash of the gen teacher's weights.
        batch: images generated at once.
    """

    decoder: GenDecoder
    extractor: Extractor
    teacher: str
    batch: int

    def features(self, embeds: NDArray[np.float32], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Returns features of the images generated from embeddings (B, D); no row where those are not finite."""
        rows = np.flatnonzero(np.isfinite(embeds).all(axis=1))
        if not len(rows):
            return np.zeros((0, 1), dtype=np.float32)
        images = self.decoder.decode(torch.from_numpy(embeds[rows]), [seeds[row] for row in rows.tolist()])
        return self.extractor.features([Image.fromarray(image) for image in images])

    def folder(self, run: Path) -> Path:
        """Returns the folder of features made with these settings."""
        return feature_folder(run, self.extractor, self.teacher, self.decoder.steps, self.decoder.guidance)


def feature_folder(run: Path, extractor: Extractor, teacher: str, steps: int, guidance: float) -> Path:
    """Returns the folder for features of generated images; its name has a hash of the settings."""
    settings = (extractor.identity, extractor.side, steps, guidance)
    digest = hashlib.sha256(f"{teacher} {settings}".encode()).hexdigest()[:12]
    return run / "generated" / f"{extractor.name}-{digest}"


def feature_file(folder: Path, key: ScoreKey, embeds: NDArray[np.float32]) -> Path:
    """Returns the file for features of one series; its name has a hash of the embeddings."""
    digest = hashlib.sha256(np.ascontiguousarray(embeds).tobytes()).hexdigest()[:12]
    name = "-".join(part for part in (key.layer, key.probe, key.control, str(key.seed)) if part)
    return folder / f"{name}-{digest}.safetensors"


def image_seeds(names: Sequence[str]) -> list[int]:
    """Derives a seed from every image's name, so that every layer, run and selection starts from the same noise."""
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in names]


def require_images(number: int) -> None:
    """Raises UserError if there are too few images for the covariance of a part of them."""
    if number < FEWEST:
        raise UserError(f"a distance between sets of images needs at least {FEWEST} images, not {number}; take more")


def write_distances(run: Run, embeddings: ScoreFile, images: ImageList, generator: Generator) -> None:
    """Generates the images that are missing, and writes both distances of every series.

    Args:
        run: the run.
        embeddings: by series.
        images: of which some may have turned out to be unreadable.
        generator: makes features from embeddings.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; finished series are stored.
    """
    names = embeddings.names
    require_images(len(names))
    folder = generator.folder(run.path)
    files = {key: feature_file(folder, key, embeds) for key, embeds in embeddings.table.items()}
    generate_missing(embeddings, files, generator)
    real, cached = reference_features(generator.extractor, replace(images, names=names))
    logger.info("features of the %d real images: %s", len(real), "from the cache" if cached else "computed and cached")
    enough = describe(generator.extractor.metrics[0]).enough_images
    if len(real) < enough:
        logger.warning("%d images: below %d a Fréchet distance is biased upwards", len(real), enough)
    features = {}
    for key, file in files.items():
        with reading(file, "remove it and evaluate again"):
            stored = load_file(file)["features"]
        finite = np.isfinite(embeddings.table[key]).all(axis=1)
        features[key] = np.full((len(names), real.shape[1]), np.nan, dtype=np.float32)
        features[key][finite] = stored
    generated = replace(embeddings, table=features, settings=folder.name)
    rows = summarise(run, generated, real, generator.extractor.metrics)
    with disk_errors(run.path):
        file = run.path / "scores" / f"{generator.extractor.metrics[0]}-{embeddings.split}.json"
        write_summaries(file, rows)


def generate_missing(embeddings: ScoreFile, files: dict[ScoreKey, Path], generator: Generator) -> None:
    """Writes features of generated images to the files that do not exist yet."""
    missing = {key: file for key, file in files.items() if not file.exists()}
    if not missing:
        return
    names, seeds = embeddings.names, image_seeds(embeddings.names)
    batches = [slice(first, first + generator.batch) for first in range(0, len(names), generator.batch)]
    line = "generating %d x %d images, %d steps each; %d series exist"
    logger.info(line, len(missing), len(names), generator.decoder.steps, len(files) - len(missing))
    with (
        Interruption().watch() as interruption,
        Progress("generating", len(missing) * len(batches), unit="batches") as bar,
    ):
        for key, file in missing.items():
            parts = []
            for batch in batches:
                parts.append(generator.features(embeddings.table[key][batch], seeds[batch]))
                bar.advance()
                if interruption.requested:
                    raise Interrupted
            features = np.concatenate([part for part in parts if len(part)] or parts[:1])
            with disk_errors(file), atomic_file(file) as temporary:
                save_file({"features": features}, temporary)


def summarise(run: Run, features: ScoreFile, real: NDArray[np.float32], metrics: tuple[str, str]) -> list[Summary]:
    """Computes both distances of every series, and of every mean over layers.

    Each is over the images that could be generated, at all of its layers.

    Args:
        run: the run.
        features: of generated images, NaN where there is none; their settings name how they were generated.
        real: features of the real images, in the same order.
        metrics: names of the Fréchet and of the kernel distance.
    """
    known: dict[tuple[int, bytes], tuple[Jackknife, NDArray[np.float64]]] = {}

    def distances(stack: NDArray[np.float32], rows: NDArray[np.bool_]) -> tuple[Jackknife, NDArray[np.float64]]:
        key = (id(stack), rows.tobytes())
        if key not in known:
            generated, truth = stack[:, rows], real[rows]
            kernel = np.mean([kernel_distances(one, truth) for one in generated], axis=0)
            known[key] = frechet_jackknife(generated, reference(rows.tobytes())), kernel
        return known[key]

    @functools.cache
    def reference(rows: bytes) -> Gaussian:
        return Gaussian.fit(real[np.frombuffer(rows, dtype=np.bool_)])

    summaries: list[Summary] = []
    series = list(seed_stacks(features.table, run.recipe.fit.seeds, averages_final(run.manifest)))  # keeps ids unique
    for key, seed, stacks in series:
        rows = finite_images(*stacks)
        generated = (features.settings, list(itertools.compress(features.names, rows)))
        images = hashlib.sha256(repr(generated).encode()).hexdigest()
        row = Summary(key, features.split, seed, EMPTY, int(rows.sum()), images=images)
        frechet, kernel = (replace(row, key=replace(key, metric=metric)) for metric in metrics)
        if row.n >= FEWEST:
            jackknives, kernels = zip(*(distances(stack, rows) for stack in stacks), strict=True)
            jackknife = Jackknife.mean(jackknives)
            frechet = replace(frechet, interval=jackknife.interval(), jackknife=jackknife)
            kernel = replace(kernel, interval=subset_spread(np.mean(kernels, axis=0)))
        summaries += [frechet, kernel]
    return summaries
