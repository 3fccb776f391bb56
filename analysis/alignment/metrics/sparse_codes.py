"""Sparse sums of word embeddings: how much of a patch state a few words explain."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from analysis.alignment.context import AlignmentContext
from analysis.alignment.metrics.base import LabelledBatch, Measure, ScoreRow, States

COUNTS = (1, 2, 4, 8)
"""Numbers of words in a sum."""
PATCHES = 2
"""Random patches of each image that are decomposed: each is compared with the whole vocabulary."""


class SparseCodes(Measure):
    """Share of a patch's squared length that a sum of few words explains, and one of few random vectors."""

    def __init__(self, context: AlignmentContext) -> None:
        self.patches = context.patch_order[:PATCHES]
        self.dictionaries = {"none": context.vocabulary, "random": random_atoms(context.vocabulary, 0)}

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields one number per image, dictionary, pursuit and number of words."""
        vectors = states.values[:, self.patches]
        for control, atoms in self.dictionaries.items():
            steps = min(COUNTS[-1], vectors.shape[-1], len(atoms))
            for method in FITS:
                energy = pursue(vectors.flatten(0, 1), atoms, steps, method).energy.unflatten(0, vectors.shape[:2])
                for count in (count for count in COUNTS if count <= steps):
                    key = states.key("words", f"explained_energy_{count}", method, control)
                    yield ScoreRow(key, energy[..., count - 1].mean(dim=1), states.finite)


class Pursuit(NamedTuple):
    """Atoms of each vector, in the order in which they were chosen.

    Attributes:
        atoms: indices into the dictionary, (B, steps). One with coefficient 0 has no part in the vector.
        coefficients: of the atoms scaled to length one, (B, steps), float64.
        energy: explained share of the squared length after each step, (B, steps), float64; 0 for a zero vector.
    """

    atoms: Tensor
    coefficients: Tensor
    energy: Tensor


@torch.no_grad()
def pursue(vectors: Tensor, atoms: Tensor, steps: int, method: str = "orthogonal") -> Pursuit:
    """Adds, step by step, the atom that correlates most with the residual, and fits coefficients.

    `matching pursuit` (Mallat & Zhang, 1993, doi.org/10.1109/78.258082): only the new atom is fitted, and atoms may
    come again. `orthogonal` (Pati et al., 1993, doi.org/10.1109/ACSSC.1993.342465): least squares over all atoms.
    `non-negative` (Bruckstein et al., 2008, doi.org/10.1109/TIT.2008.929920): the same with coefficients of at least 0,
    and the atom of the largest positive correlation.

    Correlations are computed on the device and in the precision of the arguments (at least float32), fits in float64 on
    the CPU, whose `lstsq` allows for dependent atoms.

    Args:
        vectors: (B, d), finite.
        atoms: dictionary (K, d), of any lengths; a zero row never has a part.
        steps: number of atoms, at most min(K, d).
        method: a key of `FITS`.
    """
    atoms = atoms.to(torch.promote_types(torch.promote_types(vectors.dtype, atoms.dtype), torch.float32))
    norms = torch.linalg.vector_norm(atoms, dim=1)
    norms = torch.where(norms > 0, norms, torch.inf)
    targets = residual = vectors.double().cpu()
    length = targets.square().sum(dim=1)
    # An atom within round-off of zero correlation is not fitted, so that its coefficient is exactly zero.
    floor = max(10 * torch.finfo(atoms.dtype).eps, 1e-12) * length.sqrt()
    chosen = torch.empty(len(vectors), 0, dtype=torch.long, device=atoms.device)
    basis, coefficients, energy = targets.new_empty(*targets.shape, 0), targets.new_empty(len(targets), 0), []
    for _ in range(steps):
        scores = (residual.to(atoms) @ atoms.T).div_(norms)
        if method != "non-negative":
            scores.abs_()
        if method != "matching pursuit":
            scores.scatter_(1, chosen, -torch.inf)
        best, index = scores.max(dim=1)
        unit = F.normalize(atoms[index].cpu().double(), dim=1) * (best.cpu() > floor)[:, None]
        chosen, basis = torch.cat([chosen, index[:, None]], dim=1), torch.cat([basis, unit[..., None]], dim=2)
        coefficients = FITS[method](basis, targets, coefficients)
        residual = targets - (basis @ coefficients[..., None]).squeeze(-1)
        energy.append(torch.where(length > 0, 1 - residual.square().sum(dim=1) / length, 0))
    return Pursuit(*(result.to(atoms.device) for result in (chosen, coefficients, torch.stack(energy, dim=1))))


def _project(basis: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    residual = targets - (basis[..., :-1] @ coefficients[..., None]).squeeze(-1)
    return torch.cat([coefficients, (basis[..., -1] * residual).sum(dim=1, keepdim=True)], dim=1)


def _least_squares(basis: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    return torch.linalg.lstsq(basis, targets[..., None], driver="gelsd").solution.squeeze(-1) * basis.any(dim=1)


def _non_negative_least_squares(basis: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    return torch.from_numpy(np.stack([nnls(*pair)[0] for pair in zip(basis.numpy(), targets.numpy(), strict=True)]))


FITS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matching pursuit": _project,
    "orthogonal": _least_squares,
    "non-negative": _non_negative_least_squares,
}
"""Unit atoms so far (B, d, k), targets (B, d), coefficients of the step before (B, k - 1) → coefficients (B, k)."""


def random_atoms(like: Tensor, seed: int) -> Tensor:
    """A dictionary of the same size with random directions, the same on every device: the control of a pursuit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)
