"""What vectors are made of: sparse sums over a dictionary of atoms, word embeddings say, and how much they explain."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

SCORES_AT_ONCE = 2**26
"""Correlations held at once: vectors are taken in groups, so that a vocabulary costs 256 MiB of float32 at a time."""
DEPENDENT = 1e-10
"""An atom whose part outside the span of those chosen before is shorter than this adds no direction of its own."""


@dataclass(frozen=True)
class Pursuit:
    """Atoms found for each vector, in the order in which they were found.

    Attributes:
        atoms: indices into the dictionary, (B, steps), int64. One with coefficient 0 has no part in the vector.
        coefficients: of the atoms scaled to length one, (B, steps), float64.
        energy: share of the vector's squared length explained after each step, 1 - |r|² / |v|², (B, steps), float64;
            0 for a zero vector.
    """

    atoms: Tensor
    coefficients: Tensor
    energy: Tensor


@torch.no_grad()
def matching_pursuit(vectors: Tensor, atoms: Tensor, steps: int) -> Pursuit:
    """Takes away, step by step, the projection on the atom that correlates most with what is left.

    Mallat & Zhang (1993, doi.org/10.1109/78.258082): k* = argmax |<r, d_k>|, a = <r, d_k*>, r ← r - a d_k*, with atoms
    of length one. Each step explains a² more of the squared length. An atom may be chosen again, with its own
    coefficient each time.

    Correlations are computed in the precision of the arguments (at least float32); the rest in float64.

    Args:
        vectors: (B, d).
        atoms: dictionary (K, d), of any lengths; a zero row is never part of a vector.
        steps: number of atoms for each vector.

    Returns:
        Atoms, the coefficient of each step, and explained energy. What it means is told by the same on `random_atoms`.

    Raises:
        ValueError: shapes do not fit, steps are fewer than one, or a value is not finite.
    """
    return _pursue(vectors, atoms, steps, _match)


@torch.no_grad()
def orthogonal_matching_pursuit(vectors: Tensor, atoms: Tensor, steps: int, non_negative: bool = False) -> Pursuit:
    """The same, but after each step all coefficients are fitted again by least squares, and no atom is chosen twice.

    Pati, Rezaiifar & Krishnaprasad (1993, doi.org/10.1109/ACSSC.1993.342465).

    Args:
        vectors: (B, d).
        atoms: dictionary (K, d), of any lengths; a zero row is never part of a vector.
        steps: number of atoms for each vector.
        non_negative: choose the atom of the largest positive correlation, and fit with coefficients of at least 0
            (Bruckstein, Elad & Zibulevsky, 2008, doi.org/10.1109/TIT.2008.929920). Where no atom correlates positively
            any more, those that follow have coefficient 0, and the energy stays.

    Returns:
        Atoms, their coefficients in the last fit, and energy after each step, which never falls.

    Raises:
        ValueError: shapes do not fit, steps are not in 1 … min(K, d), or a value is not finite.
    """
    if atoms.ndim == 2 and steps > min(atoms.shape):
        raise ValueError(f"of atoms (K, d) {tuple(atoms.shape)} at most {min(atoms.shape)} can be fitted, not {steps}")
    return _pursue(vectors, atoms, steps, partial(_match_orthogonally, non_negative=non_negative))


def random_atoms(like: Tensor, seed: int) -> Tensor:
    """A dictionary of the same size whose directions are random: what so many atoms of this width explain by chance.

    Rows are Gaussian, and so of uniform direction. The draw does not depend on the device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)


@dataclass(frozen=True)
class _Dictionary:
    """Atoms as they were given, and their lengths; no second copy of a large vocabulary is made.

    Attributes:
        atoms: (K, d), float32 or float64.
        norms: (K); infinite for a zero atom, which so correlates with nothing.
    """

    atoms: Tensor
    norms: Tensor

    @classmethod
    def of(cls, atoms: Tensor, dtype: torch.dtype) -> "_Dictionary":
        atoms = atoms.to(dtype)
        norms = torch.linalg.vector_norm(atoms, dim=1)
        if not norms.isfinite().all():
            raise ValueError("an atom is not finite")
        return cls(atoms, torch.where(norms > 0, norms, torch.inf))

    def correlations(self, residual: Tensor) -> Tensor:
        """Inner products of residuals (B, d) with all atoms at length one, (B, K)."""
        return (residual.to(self.atoms) @ self.atoms.T).div_(self.norms)

    def unit(self, chosen: Tensor) -> Tensor:
        """Chosen (B) atoms at length one, (B, d), float64; a zero atom stays zero."""
        atoms = self.atoms[chosen].double()
        norms = torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
        return atoms / torch.where(norms > 0, norms, 1)


def _pursue(
    vectors: Tensor, atoms: Tensor, steps: int, match: Callable[[Tensor, _Dictionary, int], Pursuit]
) -> Pursuit:
    """Checks the arguments and matches vectors group by group."""
    if vectors.ndim != 2 or atoms.ndim != 2 or vectors.shape[1] != atoms.shape[1] or 0 in (*vectors.shape, len(atoms)):
        raise ValueError(f"cannot decompose {tuple(vectors.shape)} (B, d) into atoms {tuple(atoms.shape)} (K, d)")
    if steps < 1:
        raise ValueError(f"a pursuit takes at least one step, not {steps}")
    if not vectors.isfinite().all():
        raise ValueError("a vector is not finite")
    precision = torch.promote_types(torch.promote_types(vectors.dtype, atoms.dtype), torch.float32)
    dictionary = _Dictionary.of(atoms, precision)
    groups = torch.split(vectors.double(), max(1, SCORES_AT_ONCE // len(atoms)))
    found = [match(group, dictionary, steps) for group in groups]
    return Pursuit(
        torch.cat([one.atoms for one in found]),
        torch.cat([one.coefficients for one in found]),
        torch.cat([one.energy for one in found]),
    )


def _match(vectors: Tensor, dictionary: _Dictionary, steps: int) -> Pursuit:
    residual, atoms, coefficients, energy = vectors, [], [], []
    for _ in range(steps):
        chosen = dictionary.correlations(residual).abs_().argmax(dim=1)
        unit = dictionary.unit(chosen)
        coefficient = (residual * unit).sum(dim=1)
        residual = residual - coefficient[:, None] * unit
        atoms.append(chosen)
        coefficients.append(coefficient)
        energy.append(_explained(vectors, residual))
    return Pursuit(torch.stack(atoms, dim=1), torch.stack(coefficients, dim=1), torch.stack(energy, dim=1))


def _match_orthogonally(vectors: Tensor, dictionary: _Dictionary, steps: int, non_negative: bool) -> Pursuit:
    """Keeps an orthonormal basis of the atoms of each vector: unit atom j = Σ_i mixing[i, j] · basis[i].

    Least squares in the coordinates of that basis has no more rows than there are steps.
    """
    count, width = vectors.shape
    atoms = torch.zeros(count, steps, dtype=torch.long, device=vectors.device)
    basis, mixing = vectors.new_zeros(count, steps, width), vectors.new_zeros(count, steps, steps)
    target, coefficients = vectors.new_zeros(count, steps), vectors.new_zeros(count, steps)
    residual, energy = vectors, vectors.new_zeros(count, steps)
    # Where all that an atom could explain is round-off it is not taken, so that its coefficient is exactly zero.
    floor = 10 * torch.finfo(dictionary.atoms.dtype).eps * torch.linalg.vector_norm(vectors, dim=1)
    for step in range(steps):
        scores = dictionary.correlations(residual)
        if not non_negative:
            scores.abs_()
        best, atoms[:, step] = scores.scatter_(1, atoms[:, :step], -torch.inf).max(dim=1)
        unit = dictionary.unit(atoms[:, step]).masked_fill_((best <= floor)[:, None], 0)
        basis[:, step], mixing[:, : step + 1, step] = _new_direction(unit, basis[:, :step])
        target[:, step] = (basis[:, step] * vectors).sum(dim=1)
        fitted = target
        if non_negative:
            coefficients[:, : step + 1] = _least_squares_non_negative(mixing, target, step + 1)
            fitted = (mixing @ coefficients[..., None]).squeeze(-1)
        residual = vectors - (basis.mT @ fitted[..., None]).squeeze(-1)
        energy[:, step] = _explained(vectors, residual)
    if not non_negative:
        coefficients = _solved(mixing, target)
    return Pursuit(atoms, coefficients, energy)


def _new_direction(unit: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The part of unit vectors (B, d) outside an orthonormal basis (B, k, d).

    Returns:
        It at length one, (B, d), or zero where there is none, and the coordinates of the unit vectors, (B, k + 1).
    """
    rest, coordinates = unit, unit.new_zeros(len(unit), basis.shape[1])
    # Once leaves round-off where vectors are nearly dependent; twice is enough (Giraud et al., 2005).
    for _ in range(2):
        part = (basis @ rest[..., None]).squeeze(-1)
        rest = rest - (basis.mT @ part[..., None]).squeeze(-1)
        coordinates = coordinates + part
    height = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    height = torch.where(height > DEPENDENT, height, 0)
    direction = torch.where(height > 0, rest / torch.where(height > 0, height, 1), 0)
    return direction, torch.cat([coordinates, height], dim=1)


def _solved(mixing: Tensor, target: Tensor) -> Tensor:
    """Coefficients of atoms from coordinates in their basis; 0 for an atom without a direction of its own."""
    empty = torch.diag_embed((mixing.diagonal(dim1=1, dim2=2) == 0).to(mixing))
    coefficients: Tensor = torch.linalg.solve_triangular(mixing + empty, target[..., None], upper=True)
    return coefficients.squeeze(-1)


def _least_squares_non_negative(mixing: Tensor, target: Tensor, size: int) -> Tensor:
    """Coefficients (B, size) of at least 0 that come nearest to the target."""
    systems = zip(mixing[:, :size, :size].cpu().numpy(), target[:, :size].cpu().numpy(), strict=True)
    return torch.from_numpy(np.stack([nnls(system, goal)[0] for system, goal in systems])).to(target)


def _explained(vectors: Tensor, residual: Tensor) -> Tensor:
    """1 - |r|² / |v|², (B); 0 for a zero vector, of which there is nothing to explain."""
    whole, left = vectors.square().sum(dim=1), residual.square().sum(dim=1)
    return torch.where(whole > 0, 1 - left / torch.where(whole > 0, whole, 1), 0)
