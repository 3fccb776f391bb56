"""The ridge readout: a linear map from image token to target at the same grid position, in closed form.

The pass over the data gathers only sums, so the readout needs no optimisation and no stored states, and its score does
not depend on how well a probe trained.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from probing.models.base import FINAL, Layer, layer_name
from probing.probes.bank import LAYER_CONVENTION, RETRAIN_ADVICE
from probing.utils.files import reading

RidgeKey = tuple[str, Layer]
"""Teacher and layer."""
Grid = tuple[int, int] | None
"""Rows and columns of a target; None for a single token."""
RidgeSource = Grid | str
"""What a readout reads: image tokens at the grid of the target, or the mean state at a position of the prompt."""
RELATIVE_SPREAD = 2.0**-23
"""Least variance of the states that counts, relative to their mean square: below it they are constant but for rounding,
as those of the prompt at layer 0."""


def resize_states(states: Tensor, grid: tuple[int, int], target_grid: Grid) -> Tensor:
    """Resizes image-token states to the grid of a target, bilinearly.

    Args:
        states: (B, rows * columns, H).
        grid: rows and columns of the image tokens.
        target_grid: rows and columns of the target; None for a single-token target, which gets the mean state.

    Returns:
        (B, N, H), float32.
    """
    states = states.float()
    if target_grid is None:
        return states.mean(dim=1, keepdim=True)
    if target_grid == grid:
        return states
    plane = states.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(plane, size=target_grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


@dataclass
class RidgeSums:
    """Running sums for the regressions of one layer on the targets of one grid.

    Sums are in float64, because the centred covariance is a small difference of large sums. Products of a batch are in
    float32 on accelerators, where float64 is up to 64 times as slow; of states without their mean, to lose little.

    Attributes:
        sums: `n`, `x` (H) and `xx` (H, H) of the states, and by teacher `y/NAME` (D) and `xy/NAME` (H, D).
    """

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, states: Tensor, targets: Mapping[str, Tensor], chosen: Tensor) -> None:
        """Adds the chosen images (B), bool, of a batch: states (B, N, H) and by teacher targets (B, N, D)."""
        rows = chosen.repeat_interleave(states.shape[1], output_size=states[..., 0].numel())[:, None]
        n = rows.sum().double()
        precision = batch_precision(states.device)
        x, mean_x, sum_x = _centred(states, rows, n, precision)
        self._add("n", n)
        self._add("x", sum_x)
        self._add_product("xx", x.T @ x, (mean_x, sum_x), (mean_x, sum_x), n)
        y, mean_y, sum_y = _centred(torch.cat(list(targets.values()), dim=-1), rows, n, precision)
        product, first = x.T @ y, 0
        for name, target in targets.items():
            own = slice(first, first := first + target.shape[-1])
            self._add(f"y/{name}", sum_y[own])
            self._add_product(f"xy/{name}", product[:, own], (mean_x, sum_x), (mean_y[own], sum_y[own]), n)

    def _add(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(value, dtype=torch.float64)
        self.sums[name] += value  # in place: the large ones are 134 MB each at a width of 4096

    def _add_product(
        self, name: str, centred: Tensor, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], n: Tensor
    ) -> None:
        """Adds the sum of x y', given that of (x - m)(y - l)' and m, sum of x, l, sum of y.

        For any m and l: sum of x y' = sum of (x - m)(y - l)' + m (sum of y)' + (sum of x - n m) l'.
        """
        (mean_x, sum_x), (mean_y, sum_y) = x, y
        self._add(name, centred)
        self.sums[name].addr_(mean_x, sum_y).addr_(sum_x - n * mean_x, mean_y)

    @classmethod
    def zeros(cls, width: int, target_widths: Mapping[str, int], device: torch.device) -> "RidgeSums":
        """Returns the sums of no images."""
        sums = cls()
        nothing = torch.zeros(1, 1, width, device=device)
        targets = {name: nothing.new_zeros(1, 1, target_width) for name, target_width in target_widths.items()}
        sums.add(nothing, targets, torch.zeros(1, dtype=torch.bool, device=device))
        return sums

    def solve(self, penalty: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Solves ridge regression with an unpenalised intercept (Hastie et al., ESL, sec. 3.4.1).

        Args:
            penalty: multiple of the mean eigenvalue of the states' covariance.

        Returns:
            Per teacher weight (D, H) and bias (D), float64: prediction = states @ weight.T + bias. NaN without images.
        """
        xx, x, n = (self.sums[name] for name in ("xx", "x", "n"))
        cross = {name.removeprefix("xy/"): xy for name, xy in self.sums.items() if name.startswith("xy/")}
        mean_x, means = x / n, {name: self.sums[f"y/{name}"] / n for name in cross}
        covariances = [xy / n - torch.outer(mean_x, means[name]) for name, xy in cross.items()]
        if n:  # all targets at once, with one factorisation
            covariance = (xx / n).addr_(mean_x, mean_x, alpha=-1)
            diagonal = covariance.diagonal()
            least = (RELATIVE_SPREAD * xx.diagonal().mean() / n).clamp(min=torch.finfo(covariance.dtype).tiny)
            diagonal += penalty * diagonal.mean().maximum(least)
            solved = torch.linalg.solve(covariance, torch.cat(covariances, dim=1))
            covariances = list(solved.split([xy.shape[1] for xy in covariances], dim=1))
        weights = {name: weight.T for name, weight in zip(cross, covariances, strict=True)}
        return {name: (weight, means[name] - weight @ mean_x) for name, weight in weights.items()}


def batch_precision(device: torch.device) -> torch.dtype:
    """Returns the dtype in which the products of a batch are computed."""
    return torch.float64 if device.type == "cpu" else torch.float32


def _centred(values: Tensor, rows: Tensor, n: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the chosen rows (B N, W) minus their mean, others zero; the mean and the sum, both float64."""
    flat = values.flatten(0, 1).to(precision).where(rows, 0)
    total = flat.sum(0, dtype=torch.float64)
    mean = (total / n.clamp(min=1)).to(precision)
    return (flat - mean).where(rows, 0), mean.double(), total


@dataclass
class RidgeReadout:
    """Solved readouts of a control: {(teacher, layer): (weight (D, H), bias (D))}."""

    maps: dict[RidgeKey, tuple[Tensor, Tensor]]

    def at(self, layer: Layer) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields teacher, weight and bias of every readout of one layer."""
        return ((teacher, w, b) for (teacher, key), (w, b) in self.maps.items() if key == layer)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes `<teacher>/config.json` and `<teacher>/model.safetensors` below a folder."""
        for teacher in dict.fromkeys(name for name, _ in self.maps):
            tensors = {}
            for (name, layer), (weight, bias) in self.maps.items():
                if name == teacher:
                    tensors[f"layer_{layer_name(layer)}.weight"] = weight.cpu().contiguous()
                    tensors[f"layer_{layer_name(layer)}.bias"] = bias.cpu().contiguous()
            (folder / teacher).mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / teacher / "model.safetensors", metadata={"format": "pt"})
            config = {"probe": "ridge", "tensor_prefix": "layer_{layer}.", "layer_convention": LAYER_CONVENTION}
            text = json.dumps(config | provenance, indent=2) + "\n"
            (folder / teacher / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "RidgeReadout":
        """Reads what `save` wrote; empty if the folder does not exist."""
        maps: dict[RidgeKey, tuple[Tensor, Tensor]] = {}
        for path in sorted(folder.glob("*/model.safetensors")):
            with reading(path, RETRAIN_ADVICE):
                tensors = load_file(path, device=str(device))
                for name in tensors:
                    text, _, leaf = name.removeprefix("layer_").partition(".")
                    if leaf == "weight":
                        layer: Layer = text if text == FINAL else int(text)
                        maps[path.parent.name, layer] = (tensors[name], tensors[f"layer_{text}.bias"])
        return cls(maps)
