"""Numbers that are not finite: their images are left out of those layers, counted and named."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probing.models.base import layer_ranges

logger = logging.getLogger(__name__)

NotFinite = dict[tuple[str, str], NDArray[np.bool_]]
"""(`layer`, its name) or (`teacher`, its name) → which images of a split have features that are not finite."""


def finite_rows(values: Tensor) -> Tensor:
    """Returns which rows of (B, …) are all finite, (B) bool; without synchronising with the device."""
    dims = tuple(range(1, values.dim()))
    return values.detach().abs().amax(dim=dims).isfinite()  # `vector_norm` takes five times as long on a CPU


def zero_others(values: Tensor, rows: Tensor) -> Tensor:
    """Sets to zero the rows of (B, …) that are not selected, even if they are not finite."""
    return torch.where(rows.view(-1, *[1] * (values.dim() - 1)), values, 0)


def not_finite_rows(
    not_finite: Mapping[tuple[str, str], NDArray[np.bool_]], names: Sequence[str], split: str, control: str
) -> list[dict[str, str]]:
    """Returns one row per image for the manifest: image, split, control, layers (as `layer_ranges`), teachers."""
    rows = []
    for index in np.flatnonzero(np.logical_or.reduce(list(not_finite.values()))).tolist() if not_finite else ():
        sources = [source for source, images in not_finite.items() if images[index]]
        layers = layer_ranges([name for kind, name in sources if kind == "layer"])
        teachers = ",".join(name for kind, name in sources if kind == "teacher")
        row = {"image": names[index], "split": split, "control": control, "layers": layers, "teachers": teachers}
        rows.append(row)
    return rows


def report_not_finite(
    not_finite: Mapping[tuple[str, str], NDArray[np.bool_]], names: Sequence[str], readable: int, control: str = "none"
) -> None:
    """Logs one line per set of layers or teachers that lack the same images.

    Args:
        not_finite: see `NotFinite`.
        names: of the images.
        readable: number of images that could be read.
        control: of the run.
    """
    groups: dict[tuple[str, bytes], list[str]] = {}
    for kind, name in sorted(not_finite, key=lambda source: (source[0], not source[1].isdecimal(), source[1].zfill(9))):
        if not_finite[kind, name].any():
            groups.setdefault((kind, not_finite[kind, name].tobytes()), []).append(name)
    for (kind, images), members in groups.items():
        left_out = np.flatnonzero(np.frombuffer(images, dtype=bool))
        if kind == "teacher":
            source, features, advice = f"teacher {', '.join(members)}", "features", "check its weights"
        else:
            source = f"layer{'s' * (len(members) > 1)} {layer_ranges(members)}"
            features, advice = "hidden states", "set backbone.dtype=float32 or bfloat16"
        source += "" if control == "none" else f" ({control})"
        if len(left_out) >= readable:
            logger.warning("%s: no image has finite %s, so there is no result; %s", source, features, advice)
        else:
            text = "%s: %d of %d images left out, their %s are not finite, first %s"
            logger.warning(text, source, len(left_out), readable, features, names[left_out[0]])
