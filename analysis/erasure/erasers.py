"""Fits what erases a teacher's feature from hidden states: LEACE (Belrose et al., 2023, arXiv:2306.03819) and controls.

One pass over training images gathers the covariances of every layer. The feature is reduced to its leading principal
components, because erasing all of a wide feature would leave little of a state.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from concept_erasure import LeaceEraser, LeaceFitter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from probing.data.dataloader import Prepared
from probing.models.base import Backbone, Layer, layer_name
from probing.models.finite import finite_rows, zero_others
from probing.models.token_map import TokenMap
from probing.probes.ridge import Grid, RidgeSums, resize_states
from probing.teachers import Teacher
from probing.utils.files import atomic_file

CONTROLS = ("none", "subspace", "shuffled")
"""LEACE itself; a random subspace of the same rank and mean squared change; LEACE of other images' features."""
SAMPLE = 256
"""Images from which the principal components are computed."""
SMALLEST = 1e-12
"""Singular values that count as rounding."""


class EraserKey(NamedTuple):
    """Identifies an eraser."""

    position: str
    teacher: str
    layer: str
    control: str


Erasers = dict[EraserKey, LeaceEraser]


@dataclass(frozen=True)
class Components:
    """Leading principal components of a feature, scaled by the spread of the first: mean (D) and directions (D, r)."""

    mean: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, features: Tensor, rank: int) -> "Components":
        """Computes them from features (n, D)."""
        features = features.double().cpu()
        mean = features.mean(dim=0)
        values, vectors = torch.linalg.eigh((features - mean).T @ (features - mean) / len(features))
        scale = values[-1].clamp(min=torch.finfo(values.dtype).tiny).sqrt()
        return cls(mean, vectors.flip(1)[:, :rank] / scale)

    def __call__(self, features: Tensor) -> Tensor:
        """Projects features (B, n, D) to (B, n, r), float32."""
        directions, mean = (part.to(features.device, torch.float32) for part in (self.directions, self.mean))
        return (features - mean) @ directions


def features_at(position: str, target: Tensor, grid: Grid, tokens: TokenMap) -> Tensor:
    """Returns a teacher's target (B, N, D) for each token of a position, (B, n, D).

    Image tokens get that of their place in the image, or the only one; the text gets the mean.
    """
    count = int(tokens.mask(position)[0].sum())
    if position == "text" or grid is None:
        return target.mean(dim=1, keepdim=True).expand(-1, count, -1)
    return resize_states(target, grid, tokens.grid)[:, tokens.dropped :]


@dataclass
class EraserFit:
    """Covariances of states and features, from batch to batch.

    Attributes:
        backbone: gives the states.
        teachers: give the features.
        layers: to erase from.
        positions: to erase at.
        components: by position and teacher.
        sums: by position and layer; features of permuted images are under `NAME/shuffled`.
        previous: features of the last image of the batch before, by position and teacher.
    """

    backbone: Backbone
    teachers: Mapping[str, Teacher]
    layers: Sequence[Layer]
    positions: Sequence[str]
    components: dict[tuple[str, str], Components]
    sums: dict[tuple[str, Layer], RidgeSums] = field(default_factory=dict)
    previous: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, prepared: Prepared) -> None:
        """Adds a batch of images."""
        assert prepared.student is not None
        batch = prepared.student.to(self.backbone.device)
        targets = {name: prepared.target(teacher).to(self.backbone.device) for name, teacher in self.teachers.items()}
        finite = torch.stack([finite_rows(target) for target in targets.values()]).all(dim=0)
        concepts: dict[str, dict[str, Tensor]] = {}
        for position, (name, target) in itertools.product(self.positions, targets.items()):
            target = zero_others(target, finite)
            own = self.components[position, name](features_at(position, target, self.teachers[name].grid, batch.tokens))
            before = self.previous.get((position, name), own[-1:])  # the image before; of the first batch the last one
            self.previous[position, name] = own[-1:]
            other = torch.cat((before, own[:-1]))
            concepts.setdefault(position, {}).update({name: own, f"{name}/shuffled": other})

        def visit(layer: Layer, hidden: Tensor) -> None:
            for position in self.positions:
                states, _ = batch.tokens.select(hidden.to(self.backbone.device), [position])
                chosen = finite & finite_rows(states)
                self.sums.setdefault((position, layer), RidgeSums()).add(states.float(), concepts[position], chosen)

        self.backbone.stream(batch, self.layers, visit)

    def solve(self) -> Erasers:
        """Computes the erasers, float32."""
        erasers = {}
        for (position, layer), sums in self.sums.items():
            for name in self.teachers:
                for control, eraser in solve(sums.sums, name).items():
                    erasers[EraserKey(position, name, layer_name(layer), control)] = eraser
        return erasers


def solve(sums: Mapping[str, Tensor], name: str) -> dict[str, LeaceEraser]:
    """Computes LEACE and its controls from the sums of `RidgeSums`, float32.

    LEACE erases every direction that correlates with the feature, however little, and by chance all do. Erased are
    those whose canonical correlation is above the largest with the features of other images; there may be none.
    """
    n, mean = sums["n"], sums["x"] / sums["n"]
    scatter = sums["xx"] - n * torch.outer(mean, mean)
    scatter = (scatter + scatter.T) / 2
    inverse = torch.linalg.pinv(scatter, hermitian=True)
    own, others = (sums[f"xy/{key}"] - torch.outer(mean, sums[f"y/{key}"]) for key in (name, f"{name}/shuffled"))
    values, vectors = torch.linalg.eigh(own.T @ inverse @ own)  # squares of the correlations
    other_values, other_vectors = torch.linalg.eigh(others.T @ inverse @ others)
    rank = int((values > other_values[-1]).sum())
    readouts = torch.randn(len(mean), rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    crosses = {
        "none": own @ vectors[:, len(values) - rank :],
        "subspace": scatter @ readouts.to(scatter),
        "shuffled": others @ other_vectors[:, len(values) - rank :],
    }
    if not rank:
        nothing = LeaceEraser(mean.new_zeros(len(mean), 0).float(), mean.new_zeros(0, len(mean)).float(), mean.float())
        return dict.fromkeys(CONTROLS, nothing)
    found = {control: _leace(n, mean, scatter, cross) for control, cross in crosses.items()}
    changes = {
        control: ((one.proj_left.T @ one.proj_left) * (one.proj_right @ scatter @ one.proj_right.T)).sum()
        for control, one in found.items()
    }  # squared, times n
    scales = {"subspace": (changes["none"] / changes["subspace"]).sqrt()}
    return {
        control: LeaceEraser((scales.get(control, 1) * one.proj_left).float(), one.proj_right.float(), mean.float())
        for control, one in found.items()
    }


def _leace(n: Tensor, mean: Tensor, scatter: Tensor, cross: Tensor) -> LeaceEraser:
    """Computes the eraser of a concept from sums over n states: of x x' and of x z', both centred."""
    fitter = LeaceFitter(
        len(mean), cross.shape[1], shrinkage=False, constrain_cov_trace=False, svd_tol=SMALLEST, device=mean.device,
        dtype=mean.dtype,
    )  # fmt: skip
    scale = cross.norm().clamp(min=torch.finfo(cross.dtype).tiny)  # of no effect but on the tolerance
    fitter.n, fitter.mean_x, fitter.sigma_xx_, fitter.sigma_xz_ = n, mean, scatter, cross / scale * (n - 1)
    return fitter.eraser


def save_erasers(erasers: Erasers, file: Path, settings: str) -> None:
    """Writes erasers, and what they depend on."""
    tensors: dict[str, Tensor] = {}
    for key, one in erasers.items():
        assert one.bias is not None
        parts = {"left": one.proj_left, "right": one.proj_right, "bias": one.bias}
        name = "/".join(key)
        tensors |= {f"{name}/{part}": value.cpu().clone() for part, value in parts.items()}
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, {"settings": settings})


def load_erasers(file: Path, settings: str, device: torch.device) -> Erasers:
    """Reads what `save_erasers` wrote; empty if there is nothing, or it was made with other settings."""
    if not file.exists():
        return {}
    with safe_open(file, framework="pt", device=str(device)) as stored:
        if stored.metadata()["settings"] != settings:
            return {}
        keys = {EraserKey(*name.split("/")[:4]) for name in stored.keys()}  # noqa: SIM118
        return {
            key: LeaceEraser(*(stored.get_tensor(f"{'/'.join(key)}/{part}") for part in ("left", "right", "bias")))
            for key in sorted(keys)
        }
