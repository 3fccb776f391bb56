"""What to evaluate: the options of `probing evaluate` and `probing plan`."""

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ConfigDict, Field, field_validator

from analysis.evaluation.registry import metrics as registered
from probing.recipe import Strict

Protocol = Literal["strict", "paper", "blind"]
ProbeKind = Literal["resampler", "ridge"]
Control = Literal["none", "shuffled", "random", "blank", "other", "caption"]


class Options(Strict):
    """Selects metrics, layers, probes and controls; an empty selection is the default of each metric."""

    model_config = ConfigDict(frozen=True)

    metrics: tuple[str, ...] = Field(
        default=("cosine",),
        json_schema_extra={"choices": cast(Any, registered)},  # read when help is shown
        description="Metric to compute; repeatable. "
        + "; ".join(f"{n}: {m.help}" for n, m in registered().items())
        + ".",
    )
    protocols: tuple[Protocol, ...] = ()
    """Protocol to compute; repeatable. Ignored by metrics that lack it. Default: all of a metric."""
    layers: str | None = None
    """Layers to score, such as 0,4,8-12,final. Default: all probed layers."""
    probes: tuple[ProbeKind, ...] = ()
    """Probe to score; repeatable. Default: both; resampler alone for fid and frechet."""
    controls: tuple[Control, ...] = ()
    """Control to score; repeatable. `none` is the checkpoint itself; blank, other and caption replace the image by a
    grey one, the next one, or its caption as text. Default: those of the run; `none` alone for fid and frechet."""
    images: int | None = Field(default=None, ge=1)
    """Images per decoded metric. Default: all."""
    da2k: Path | None = None
    """Folder in the layout of DA-2K, for metric da2k."""
    inception_weights: Path | None = None
    """Weights of pytorch-fid, for metric fid. Default: download."""
    extractor: str | None = None
    """Image classifier (folder or Hub id) whose features metric frechet compares."""
    steps: int = Field(default=25, ge=1)
    """Diffusion steps per image."""
    guidance: float = Field(default=10.0, ge=1)
    """Guidance scale of the diffusion model."""
    pictures: int = Field(default=4, ge=0)
    """Images to decode at every layer as pictures, for decoded metrics."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images per forward pass. Default: as in training."""
    target_cache: str | None = None
    """Cache for teacher features: off, auto or a folder. Default: as in training."""

    @field_validator("metrics")
    @classmethod
    def _known_and_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [metric for metric in value if metric not in registered()]:
            raise ValueError(f"no metric {unknown[0]!r}; choose from {', '.join(registered())}")
        return tuple(dict.fromkeys(value))
