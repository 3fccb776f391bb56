"""Sizes of a probing run in bytes."""

from collections.abc import Mapping, Sequence

import torch

from probing.models.base import Layer
from probing.probes.bank import probe_configs
from probing.probes.resampler import Resampler
from probing.recipe import ProbeRunRecipe
from probing.teachers import Teacher


def probe_parameters(recipe: ProbeRunRecipe, hidden_size: int, teachers: Mapping[str, Teacher]) -> int:
    """Counts the parameters of the probes of one layer and control: one per teacher and seed."""
    with torch.device("meta"):
        probes = [Resampler(config) for config in probe_configs(recipe.probe, hidden_size, teachers).values()]
    return len(recipe.fit.seeds) * sum(p.numel() for probe in probes for p in probe.parameters())


def ridge_bytes(recipe: ProbeRunRecipe, hidden_size: int, teachers: Mapping[str, Teacher]) -> int:
    """Returns the bytes of one layer's ridge sums (float64) and latest solutions (float32 on accelerators)."""
    if not recipe.fit.ridge:
        return 0
    positions = len(recipe.fit.positions)
    covariances = len({teacher.grid for teacher in teachers.values()}) + positions
    target_width = (1 + positions) * sum(teacher.shape[1] for teacher in teachers.values())
    return hidden_size * (8 * covariances * hidden_size + 12 * target_width)


def disk_bytes(
    recipe: ProbeRunRecipe, hidden_size: int, teachers: Mapping[str, Teacher], layers: Sequence[Layer]
) -> int:
    """Returns the peak disk usage in bytes: the probes, and two training states while one replaces the other."""
    shuffled, random = ("shuffled" in recipe.controls), ("random" in recipe.controls)
    probes = 4 * len(layers) * probe_parameters(recipe, hidden_size, teachers)
    state = 3 * probes * (1 + shuffled) + len(layers) * ridge_bytes(recipe, hidden_size, teachers)
    return 2 * state + probes * (1 + shuffled + random)
