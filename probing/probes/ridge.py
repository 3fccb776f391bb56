"""The ridge readout: a linear map from image token to target at the same grid position, in closed form.

The pass over the data gathers only sums, so the readout needs no optimisation and no stored states, and its score does
not depend on how well a probe trained.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from probing.models.base import FINAL, Layer, layer_name
from probing.models.finite import zero_others
from probing.probes.bank import LAYER_CONVENTION, RETRAIN_ADVICE
from probing.utils.files import reading

RidgeKey = tuple[str, Layer]
"""Teacher and layer."""


def resize_states(states: Tensor, grid: tuple[int, int], target_grid: tuple[int, int] | None) -> Tensor:
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
    """Running sums for the regression of one teacher and layer.

    They are in float64, because the centred covariance is a small difference of large sums.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, states: Tensor, target: Tensor, chosen: Tensor) -> None:
        """Adds the chosen images (B), bool, of a batch: states (B, N, H) and target (B, N, D), on the same grid."""
        if states.device.type == "mps":  # no float64
            states, target, chosen = states.cpu(), target.cpu(), chosen.cpu()
        count = chosen.sum().double() * states.shape[1]
        states, target = zero_others(states, chosen), zero_others(target, chosen)
        x, y = states.flatten(0, 1).double(), target.flatten(0, 1).double()
        new = {"xx": x.T @ x, "xy": x.T @ y, "x": x.sum(0), "y": y.sum(0), "n": count}
        for name, value in new.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    @classmethod
    def zeros(cls, width: int, target_width: int, device: torch.device) -> "RidgeSums":
        """Returns the sums of no images."""
        sums = cls()
        states, target = (torch.zeros(1, 0, w, device=device) for w in (width, target_width))
        sums.add(states, target, torch.ones(1, dtype=torch.bool, device=device))
        return sums

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Solves ridge regression with an unpenalised intercept (Hastie et al., ESL, sec. 3.4.1).

        Args:
            penalty: multiple of the mean eigenvalue of the states' covariance.

        Returns:
            weight (D, H) and bias (D), float32: prediction = states @ weight.T + bias. Without images both are NaN.
        """
        xx, xy, x, y, n = (self.sums[name] for name in ("xx", "xy", "x", "y", "n"))
        if not n:
            return torch.full_like(xy.T, torch.nan).float(), torch.full_like(y, torch.nan).float()
        mean_x, mean_y = x / n, y / n
        covariance = xx / n - torch.outer(mean_x, mean_x)
        cross = xy / n - torch.outer(mean_x, mean_y)
        level = penalty * covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)
        weight = torch.linalg.solve(covariance + level * torch.eye(len(x)).to(covariance), cross).T
        return weight.float(), (mean_y - weight @ mean_x).float()


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
