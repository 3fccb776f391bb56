"""What to evaluate: the options of `probing evaluate` and `probing plan`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What `probing evaluate` is asked for.

    Attributes:
        metrics: names of registered metrics.
        protocols: those of them to compute; by default all of each metric.
        layers: which, as text; by default all that were probed.
        probes: `resampler`, `ridge`; by default both, and for generated images the resampler alone.
        controls: `none`, `shuffled`, `random`, and what replaces the image: `blank`, `other`, `caption`; by default
            those that the run has, and for generated images `none` alone.
        images: per decoded metric; by default all.
        da2k: folder in DA-2K's layout, for the metric of that name.
        inception_weights: file, for fid; by default they are downloaded.
        extractor: classifier of transformers whose features `frechet` compares.
        steps: of the diffusion solver.
        guidance: of the diffusion.
        pictures: images to draw at every layer, where a metric is decoded.
        micro_batch: images per forward pass; by default as in training.
        target_cache: see `DataRecipe.target_cache`; by default as in training. For the cosine, which needs no pixels.
    """

    metrics: tuple[str, ...] = ("cosine",)
    protocols: tuple[str, ...] = ()
    layers: str | None = None
    probes: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    images: int | None = None
    da2k: Path | None = None
    inception_weights: Path | None = None
    extractor: str | None = None
    steps: int = 25
    guidance: float = 10.0
    pictures: int = 4
    micro_batch: int | None = None
    target_cache: str | None = None
