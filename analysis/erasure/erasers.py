"""Fits what erases a teacher's feature from hidden states: LEACE (Belrose et al., 2023, arXiv:2306.03819) and controls.

One pass over training images gathers the covariances of every layer. Of states and features, only what differs between
images counts: both come without their mean at each position, so that an erasure leaves which token it is. Features are
reduced to their leading principal components, because erasing all of a wide one would leave little of a state.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from concept_erasure import LeaceEraser
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

SUBSPACE, SHUFFLED = "subspace", "shuffled"
CONTROLS = ("none", SUBSPACE, SHUFFLED)
"""LEACE itself; random subspaces of the same rank and mean squared change; LEACE of other images' features."""
SAMPLE = 256
"""Images from which the principal components are computed."""
LEAST_SPREAD = 2.0**-10
"""Least standard deviation of a component that counts, relative to the first's; about the rounding of float16."""
LEAST_STATE_SPREAD = 2.0**-18
"""Least standard deviation of states in a direction, relative to the largest or to the mean state: there is rounding of
float32 below."""
DRAWS = 8
"""Random subspaces; batches of images take turns, so that means over images are over subspaces too."""
LARGEST_POWER, BISECTIONS = 8.0, 24
"""Of the search for a random subspace."""
LAGS = 19
"""Number of other images whose features are paired with an image's states, to know what is chance."""


class EraserKey(NamedTuple):
    """Identifies an eraser; `control` ends with the number of a random subspace."""

    position: str
    teacher: str
    layer: str
    control: str


Erasers = dict[EraserKey, LeaceEraser]


@dataclass
class Components:
    """Leading principal components of a feature, from batch to batch.

    Attributes:
        scatter: sum of f f' over features f (D) without their mean.
    """

    scatter: Tensor | float = 0.0
    count: int = 0

    def add(self, features: Tensor) -> None:
        """Adds features (n, D)."""
        features = features.double().cpu()
        self.scatter, self.count = self.scatter + features.T @ features, self.count + len(features)

    def directions(self, rank: int) -> Tensor:
        """Returns what projects features to components of unit variance, (D, rank), float32."""
        values, vectors = torch.linalg.eigh(torch.as_tensor(self.scatter) / self.count)
        values = values.flip(0)[:rank]
        least = (values[0] * LEAST_SPREAD**2).clamp(min=torch.finfo(torch.float32).tiny)
        return (vectors.flip(1)[:, :rank] / values.maximum(least).sqrt()).float()


def features_at(position: str, target: Tensor, grid: Grid, tokens: TokenMap) -> Tensor:
    """Returns a teacher's target (B, N, D) for the tokens of a position: (B, n, D), or (B, 1, D) if all get the same.

    Image tokens get that of their place in the image, or the only one; the text gets the mean.
    """
    if position == "text" or grid is None:
        return target.mean(dim=1, keepdim=True)
    return resize_states(target, grid, tokens.grid)[:, tokens.dropped :]


def states_at(position: str, states: Tensor, tokens: TokenMap) -> Tensor:
    """Returns the states (B, n, H) of the tokens of a position, wherever they are in each sequence (B, T, H)."""
    place = tokens.mask(position)
    return states[place].view(len(states), int(place[0].sum()), states.shape[-1])


@dataclass
class PositionSums:
    """Running sums for covariances within positions: of the deviations from the mean at each token of a position.

    Attributes:
        start: (n, H), subtracted from states, so that little is lost when their mean is.
        pooled: sums over images and tokens.
        images: number of images.
        x: (n, H), sums of states minus `start` over images.
        y: of features (n, D), likewise.
    """

    start: Tensor
    pooled: RidgeSums = field(default_factory=RidgeSums)
    images: Tensor | float = 0.0
    x: Tensor | float = 0.0
    y: dict[str, Tensor] = field(default_factory=dict)

    def add(self, states: Tensor, features: Mapping[str, Tensor], chosen: Tensor) -> None:
        """Adds the chosen images (B), bool, of states (B, n, H) and features (B, n, D)."""
        shifted, rows = states.float() - self.start, chosen[:, None, None]
        self.pooled.add(shifted, features, chosen)

        def total(values: Tensor) -> Tensor:
            return values.where(rows, 0).sum(dim=0).to(self.pooled.sums["n"])  # float64, and where it is

        self.images = self.images + chosen.sum().to(self.pooled.sums["n"])
        self.x = self.x + total(shifted)
        for name, values in features.items():
            self.y[name] = self.y.get(name, 0.0) + total(values)

    def mean(self) -> Tensor:
        """Returns the mean state of each token, (n, H), float32."""
        return self.start + torch.as_tensor(self.x / self.images).to(self.start)

    def covariance(self, name: str = "") -> Tensor:
        """Returns that of states, (H, H), or of states and a feature, (H, D)."""
        product = self.pooled.sums[f"xy/{name}" if name else "xx"]
        other = self.y[name] if name else torch.as_tensor(self.x)
        return (product - torch.as_tensor(self.x).T @ other / self.images) / self.pooled.sums["n"]


@dataclass
class EraserFit:
    """Covariances of states and features, from batch to batch.

    Attributes:
        backbone: gives the states.
        teachers: give the features.
        layers: to erase from.
        means: of the features (N, D), by teacher.
        directions: of the components (D, rank), by position and teacher.
        lags: number of earlier images whose features are paired with an image's states.
        sums: by position and layer; those of earlier images under `NAME/shuffled`, (lags * rank).
        earlier: components of the last `lags` images (lags, n, rank), by position and teacher.
        seen: number of images.
    """

    backbone: Backbone
    teachers: Mapping[str, Teacher]
    layers: Sequence[Layer]
    means: Mapping[str, Tensor]
    directions: Mapping[tuple[str, str], Tensor]
    lags: int
    sums: dict[tuple[str, Layer], PositionSums] = field(default_factory=dict)
    earlier: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    seen: int = 0

    @torch.no_grad()
    def add(self, prepared: Prepared) -> None:
        """Adds a batch of images; the very first ones only serve as the earlier images of others."""
        assert prepared.student is not None
        batch = prepared.student.to(self.backbone.device)
        targets = {name: prepared.target(teacher).to(self.backbone.device) for name, teacher in self.teachers.items()}
        finite = torch.stack([finite_rows(target) for target in targets.values()]).all(dim=0)
        count = len(finite)
        preceded = torch.arange(self.seen, self.seen + count, device=finite.device) >= self.lags
        self.seen += count
        concepts: dict[str, dict[str, Tensor]] = {}
        for (position, name), directions in self.directions.items():
            target = zero_others(targets[name] - self.means[name], finite)
            own = features_at(position, target, self.teachers[name].grid, batch.tokens) @ directions
            own = own.expand(-1, int(batch.tokens.mask(position)[0].sum()), -1)
            row = torch.cat((self.earlier.get((position, name), own.new_zeros(self.lags, *own.shape[1:])), own))
            others = torch.cat([row[self.lags - lag :][:count] for lag in range(1, self.lags + 1)], dim=-1)
            self.earlier[position, name] = row[len(row) - self.lags :]
            concepts.setdefault(position, {}).update({name: own, f"{name}/shuffled": others})

        def visit(layer: Layer, hidden: Tensor) -> None:
            for position, features in concepts.items():
                states = states_at(position, hidden, batch.tokens).to(self.backbone.device)
                sound = finite_rows(states)
                if (position, layer) not in self.sums:
                    self.sums[position, layer] = PositionSums(zero_others(states, sound).float().mean(dim=0))
                self.sums[position, layer].add(states, features, finite & preceded & sound)

        self.backbone.stream(batch, self.layers, visit)

    def solve(self) -> Erasers:
        """Computes the erasers, float32."""
        erasers = {}
        for (position, layer), sums in self.sums.items():
            seed = zlib.crc32(f"{position} {layer}".encode())
            for (name, control), eraser in solve(sums, list(self.teachers), seed):
                erasers[EraserKey(position, name, layer_name(layer), control)] = eraser
        return erasers


def solve(sums: PositionSums, names: Sequence[str], seed: int = 0) -> Iterator[tuple[tuple[str, str], LeaceEraser]]:
    """Computes LEACE and its controls, float32; their `bias` is the mean state of each token, (n, H).

    With W = (covariance of states)^-1/2 and u the left singular vectors of W (covariance of states and feature), LEACE
    erases W^-1 u u' W (eq. 1). The factorisation that gives W is shared by teachers and controls; the package's
    `LeaceFitter` would repeat it for each, which took 10 times as long for three teachers at a width of 1,024.

    LEACE erases every direction that correlates with the feature, however little, and by chance all do. Erased are
    those whose canonical correlation is above the largest with the features of other images; there may be none. With
    19 pairings with others, chance alone erases anything with a probability of 1 in 20.

    Args:
        sums: of states, and of features of unit variance, rank under each name, and any multiple of it, of other
            images, under `NAME/shuffled`.
        names: of the teachers.
        seed: of the random subspaces.

    Yields:
        Name and control, and the eraser.
    """
    mean, covariance = sums.mean(), sums.covariance()
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = values[-1].maximum(mean.square().mean().to(values))
    known = values > largest * LEAST_STATE_SPREAD**2
    scales, vectors = values[known].sqrt(), vectors[:, known]
    generator = torch.Generator().manual_seed(seed)

    def eraser(basis: Tensor, factor: Tensor | float = 1.0) -> LeaceEraser:
        """Erases an orthonormal basis (known, r) of whitened states."""
        left, right = vectors @ (scales[:, None] * basis), (vectors @ (basis / scales[:, None])).T
        return LeaceEraser((factor * left).float(), right.float(), mean)

    for name in names:
        cross = sums.covariance(name)
        crosses = [cross, *sums.covariance(f"{name}/shuffled").split(cross.shape[1], dim=1)]
        whitened = vectors.T @ torch.stack(crosses) / scales[:, None]
        bases, correlations, _ = torch.linalg.svd(whitened, full_matrices=False)
        rank = int((correlations[0] > correlations[1:].max()).sum()) if len(scales) else 0
        own, shuffled = bases[:2, :, :rank]
        yield (name, "none"), eraser(own)
        for number in range(DRAWS):
            draw = torch.randn(len(scales), rank, generator=generator, dtype=torch.float64).to(vectors)
            yield (name, f"{SUBSPACE}{number}"), eraser(*random_subspace(draw, scales, own))
        yield (name, SHUFFLED), eraser(shuffled)


def random_subspace(draw: Tensor, scales: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a random subspace of whitened states whose erasure changes states as much as that of another.

    A uniform subspace would change them too little or too much, so its directions are weighted by a power of the
    states' standard deviations, which is found by bisection.

    Args:
        draw: (k, r), normal.
        scales: (k), the standard deviations.
        like: (k, r), orthonormal.

    Returns:
        An orthonormal basis (k, r), and the factor, nearly 1, by which its change is still too small.
    """
    if not like.shape[1]:
        return like, scales.new_ones(())
    logarithms = scales.log() - scales.log().mean()

    def weighted(power: float) -> Tensor:
        return torch.linalg.qr((power * logarithms).exp()[:, None] * draw)[0]

    def change(basis: Tensor) -> Tensor:
        return (scales[:, None] * basis).norm()

    low, high = -LARGEST_POWER, LARGEST_POWER
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if change(weighted(middle)) < change(like) else (low, middle)
    return (basis := weighted((low + high) / 2)), change(like) / change(basis)


def save_erasers(erasers: Erasers, file: Path, settings: str) -> None:
    """Writes erasers, and what they depend on."""
    tensors: dict[str, Tensor] = {}
    for key, one in erasers.items():
        assert one.bias is not None
        tensors |= {"/".join((*key, "left")): one.proj_left, "/".join((*key, "right")): one.proj_right}
        tensors[f"{key.position}/{key.layer}"] = one.bias  # the same for teachers and controls
    with atomic_file(file) as temporary:
        save_file({name: one.cpu().contiguous() for name, one in tensors.items()}, temporary, {"settings": settings})


def load_erasers(file: Path, settings: str, device: torch.device) -> Erasers:
    """Reads what `save_erasers` wrote; empty if there is nothing, or it was made with other settings."""
    if not file.exists():
        return {}
    with safe_open(file, framework="pt", device=str(device)) as stored:
        if stored.metadata()["settings"] != settings:
            return {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    keys = sorted({EraserKey(*parts[:4]) for parts in (name.split("/") for name in tensors) if len(parts) > 2})
    return {
        key: LeaceEraser(
            tensors["/".join((*key, "left"))],
            tensors["/".join((*key, "right"))],
            tensors[f"{key.position}/{key.layer}"],
        )
        for key in keys
    }


def erase_from(states: Tensor, tokens: TokenMap, erasers: Mapping[str, LeaceEraser]) -> Tensor:
    """Returns states (B, T, H) without what each eraser erases from its kind of tokens."""
    states = states.clone()
    for kind, one in erasers.items():
        assert one.bias is not None
        place = tokens.mask(kind)
        number = (place.cumsum(dim=1) - 1)[place].to(one.bias.device)  # of each token among those of its kind
        eraser = LeaceEraser(one.proj_left, one.proj_right, one.bias[number])
        states[place] = eraser(states[place].to(one.bias)).to(states)
    return states
