"""Numbers that are not finite: the images they belong to are left out of those layers, counted and named."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probing.models.base import FINAL

logger = logging.getLogger(__name__)

NotFinite = dict[tuple[str, str], NDArray[np.bool_]]
"""(`layer`, its name) or (`teacher`, its name) → which images of a split have features there that are not finite."""


def finite_rows(values: Tensor) -> Tensor:
    """Finds the rows of (B, …) whose numbers are all finite, (B) bool; no synchronisation with the device."""
    places = tuple(range(1, values.dim()))
    return torch.linalg.vector_norm(values.detach(), ord=math.inf, dim=places).isfinite()


def zero_others(values: Tensor, rows: Tensor) -> Tensor:
    """Sets to zero the rows of (B, …) that are not chosen, whatever they hold."""
    return torch.where(rows.view(-1, *[1] * (values.dim() - 1)), values, 0)


def layer_ranges(layers: Collection[str]) -> str:
    """Names layers as `probing.models.base.parse_layers` reads them, e.g. `2-4,final`."""
    parts: list[list[int]] = []
    for number in sorted(int(layer) for layer in layers if layer != FINAL):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    names = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ",".join(names + [FINAL] * (FINAL in layers))


def not_finite_rows(
    found: Mapping[tuple[str, str], NDArray[np.bool_]], names: Sequence[str], split: str, control: str
) -> list[dict[str, str]]:
    """One row per image for the manifest: image, split, control, layers (as `layer_ranges`) and teachers."""
    rows = []
    for index in np.flatnonzero(np.logical_or.reduce(list(found.values()))).tolist() if found else ():
        where = [place for place, images in found.items() if images[index]]
        layers = layer_ranges([name for kind, name in where if kind == "layer"])
        teachers = ",".join(name for kind, name in where if kind == "teacher")
        row = {"image": names[index], "split": split, "control": control, "layers": layers, "teachers": teachers}
        rows.append(row)
    return rows


def report_not_finite(
    found: Mapping[tuple[str, str], NDArray[np.bool_]], names: Sequence[str], readable: int, control: str = "none"
) -> None:
    """Logs one line per set of layers that lack the same images."""
    sets: dict[tuple[str, bytes], list[str]] = {}
    for kind, name in sorted(found, key=lambda place: (place[0], not place[1].isdecimal(), place[1].zfill(9))):
        if found[kind, name].any():
            sets.setdefault((kind, found[kind, name].tobytes()), []).append(name)
    weights = "" if control == "none" else f" ({control})"
    for (kind, images), places in sets.items():
        left_out = np.flatnonzero(np.frombuffer(images, dtype=bool))
        teacher = f"teacher {', '.join(places)}"
        where = teacher if kind == "teacher" else f"{'layers' if len(places) > 1 else 'layer'} {layer_ranges(places)}"
        what = "features" if kind == "teacher" else "hidden states"
        if len(left_out) >= readable:
            advice = "check its weights" if kind == "teacher" else "set backbone.dtype=float32 or bfloat16"
            logger.warning("%s%s: no image has finite %s, so there is no result; %s", where, weights, what, advice)
        else:
            line = "%s%s: %d of %d images left out, their %s are not finite, first %s"
            logger.warning(line, where, weights, len(left_out), readable, what, names[left_out[0]])
