"""Decompositions whose parts are known, and the same by independent means."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp

from analysis.alignment.metrics.sparse_codes import FITS, pursue, random_atoms


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def rebuilt(found, atoms):
    return (found.coefficients[..., None] * unit(atoms)[found.atoms]).sum(dim=1)


@pytest.mark.parametrize("method", ["orthogonal", "non-negative"])
def test_sum_of_two_atoms_is_found(method):
    atoms = 3 * normal(200, 64)
    sums = 2 * unit(atoms)[[3, 50]] + 1.5 * unit(atoms)[[7, 199]]
    found = pursue(sums, atoms, 2, method)
    assert found.atoms.tolist() == [[3, 7], [50, 199]]
    torch.testing.assert_close(found.coefficients, torch.tensor([[2, 1.5]] * 2, dtype=torch.float64))
    assert (found.energy[:, 0] < 0.95).all()
    torch.testing.assert_close(found.energy[:, 1], torch.ones(2, dtype=torch.float64))
    # Nothing is left for more steps, and they add nothing.
    more = pursue(sums, atoms, 6, method)
    assert (more.coefficients[:, 2:] == 0).all()
    assert all(len(set(row)) == 6 for row in more.atoms.tolist())
    torch.testing.assert_close(rebuilt(more, atoms), sums)


def test_orthonormal_atoms_give_largest_coordinates():
    basis = torch.linalg.qr(normal(12, 12)).Q
    vectors = normal(5, 12, seed=1)
    coordinates = vectors @ basis.T
    order = coordinates.abs().argsort(dim=1, descending=True)[:, :4]
    share = coordinates.gather(1, order).square().cumsum(1) / vectors.square().sum(1, keepdim=True)
    for method in ("matching pursuit", "orthogonal"):
        found = pursue(vectors, basis, 4, method)
        assert found.atoms.equal(order)
        torch.testing.assert_close(found.coefficients, coordinates.gather(1, order))
        torch.testing.assert_close(found.energy, share)
    positive = coordinates.argsort(dim=1, descending=True)[:, :3]
    assert (coordinates.gather(1, positive) > 0).all()
    assert pursue(vectors, basis, 3, "non-negative").atoms.equal(positive)


def test_matching_pursuit_equals_a_plain_loop():
    vectors, atoms = normal(4, 10), normal(30, 10, seed=1)
    found = pursue(vectors, atoms, 25, "matching pursuit")
    dictionary = unit(atoms).numpy()
    for i, v in enumerate(vectors.numpy()):
        r = v.copy()
        for step in range(25):
            products = dictionary @ r
            k = int(abs(products).argmax())
            assert int(found.atoms[i, step]) == k
            assert float(found.coefficients[i, step]) == pytest.approx(products[k], rel=1e-9)
            r = r - products[k] * dictionary[k]
            assert float(found.energy[i, step]) == pytest.approx(1 - r @ r / (v @ v), rel=1e-9)
    left = (vectors - rebuilt(found, atoms)).square().sum(1) / vectors.square().sum(1)
    torch.testing.assert_close(1 - left, found.energy[:, -1])
    # Each step explains its squared coefficient more, so that energy never falls.
    gained = found.coefficients.square() / vectors.square().sum(1, keepdim=True)
    torch.testing.assert_close(found.energy, gained.cumsum(1))
    assert (found.energy.diff(dim=1) >= -1e-12).all()
    assert any(len(set(row)) < 25 for row in found.atoms.tolist())  # atoms may come back


def test_orthogonal_pursuit_equals_scikit_learn():
    vectors, atoms = normal(20, 16), normal(60, 16, seed=1)
    found = pursue(vectors, atoms, 6)
    expected = orthogonal_mp(unit(atoms).T.numpy(), vectors.T.numpy(), n_nonzero_coefs=6).T
    dense = torch.zeros(20, 60, dtype=torch.float64).scatter_(1, found.atoms, found.coefficients)
    np.testing.assert_allclose(dense, expected, atol=1e-10)


@pytest.mark.parametrize("apart", [1e-3, 1e-6])
def test_every_step_is_a_least_squares_fit(apart):
    """Also where atoms are nearly the same, as words are that differ in a capital."""
    vectors, atoms = normal(6, 16), normal(30, 16, seed=1)
    atoms[15:] = atoms[:15] + apart * normal(15, 16, seed=2)
    found = pursue(vectors, atoms, 10)
    assert all(len(set(row)) == 10 for row in found.atoms.tolist())
    for i, v in enumerate(vectors.numpy()):
        for step in range(10):
            system = unit(atoms)[found.atoms[i, : step + 1]].numpy().T
            solution = np.linalg.lstsq(system, v, rcond=None)[0]
            left = v - system @ solution
            assert float(found.energy[i, step]) == pytest.approx(1 - left @ left / (v @ v), abs=1e-9)
        np.testing.assert_allclose(found.coefficients[i], solution, rtol=1e-6, atol=1e-9)
    better = found.energy - pursue(vectors, atoms, 10, "matching pursuit").energy
    assert (better[:, 1] >= -1e-12).all()
    assert (better[:, -1] > 0).all()


def test_non_negative_pursuit_equals_a_plain_loop():
    vectors, atoms = normal(10, 12), normal(25, 12, seed=1)
    found = pursue(vectors, atoms, 8, "non-negative")
    dictionary = unit(atoms).numpy()
    for i, v in enumerate(vectors.numpy()):
        chosen, r, solution = [], v, np.zeros(0)
        for step in range(8):
            products = dictionary @ r
            products[chosen] = -np.inf
            if products.max() <= 1e-12:
                break
            chosen.append(int(products.argmax()))
            solution = nnls(dictionary[chosen].T, v)[0]
            r = v - dictionary[chosen].T @ solution
            assert float(found.energy[i, step]) == pytest.approx(1 - r @ r / (v @ v), rel=1e-9)
        assert found.atoms[i, : len(chosen)].tolist() == chosen
        np.testing.assert_allclose(found.coefficients[i, : len(chosen)], solution, atol=1e-9)
    assert (found.coefficients >= 0).all()
    assert (found.energy.diff(dim=1) >= -1e-12).all()


def test_negative_part_stays_unexplained():
    vectors = torch.tensor([[2.0, -1, 0, 0], [-1, -1, 0, 0], [0, 0, 3, 4]])
    found = pursue(vectors, torch.eye(4), 3, "non-negative")
    assert found.atoms[0, 0] == 0
    assert found.coefficients.tolist() == [[2, 0, 0], [0, 0, 0], [4, 3, 0]]
    np.testing.assert_allclose(found.energy, [[0.8] * 3, [0] * 3, [16 / 25, 1, 1]])
    signed = pursue(vectors, torch.eye(4), 2)
    assert signed.coefficients[:2].tolist() == [[2, -1], [-1, -1]]
    np.testing.assert_allclose(signed.energy[:, 1], [1, 1, 1])


def test_dependent_atoms_help_non_negative_sums():
    """All is in five of sixteen dimensions: a sixth atom is no new direction, but makes more sums possible."""
    space = torch.linalg.qr(normal(16, 16, seed=5)).Q[:5]
    vectors, atoms = normal(40, 5) @ space, normal(10, 5, seed=1) @ space
    found = pursue(vectors, atoms, 9, "non-negative")
    for step in (5, 8):
        for i, v in enumerate(vectors.numpy()):
            left = nnls(unit(atoms)[found.atoms[i, : step + 1]].numpy().T, v)[1]
            assert float(found.energy[i, step]) == pytest.approx(1 - left**2 / (v @ v), abs=1e-9)
    assert (found.energy[:, 8] > found.energy[:, 4] + 0.01).any()
    torch.testing.assert_close(
        1 - (vectors - rebuilt(found, atoms)).square().sum(1) / vectors.square().sum(1), found.energy[:, -1]
    )
    # Without the sign, five steps explain everything, and the rest is zero and not noise.
    signed = pursue(vectors, atoms, 9)
    torch.testing.assert_close(signed.energy[:, 4:], torch.ones(40, 5, dtype=torch.float64))
    assert (signed.coefficients[:, 5:] == 0).all()


@pytest.mark.parametrize("method", FITS)
def test_atom_lengths_and_precision_do_not_matter(method):
    vectors, atoms = normal(23, 12), normal(40, 12, seed=1)
    expected = pursue(vectors, atoms, 5, method)
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    single = torch.nn.Parameter(atoms.float())  # as the embeddings of a model are
    for same in (
        pursue(vectors, atoms, 5, method),
        pursue(vectors, lengths * atoms, 5, method),
        pursue(vectors.float(), single, 5, method),
    ):
        assert same.atoms.equal(expected.atoms)
        assert same.coefficients.dtype == same.energy.dtype == torch.float64
        torch.testing.assert_close(same.coefficients, expected.coefficients, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same.energy, expected.energy, rtol=1e-5, atol=1e-6)
    scaled = pursue(1e3 * vectors, atoms, 5, method)
    torch.testing.assert_close(scaled.coefficients, 1e3 * expected.coefficients)
    torch.testing.assert_close(scaled.energy, expected.energy)
    assert pursue(vectors.bfloat16(), atoms.bfloat16(), 5, method).energy.isfinite().all()


@pytest.mark.parametrize("method", FITS)
def test_zero_vectors_and_atoms_have_no_part(method):
    vectors, atoms = normal(3, 6), torch.cat([torch.zeros(2, 6), normal(10, 6, seed=1)])
    vectors[1] = 0
    found = pursue(vectors, atoms, 4, method)
    assert found.energy.isfinite().all()
    assert found.energy[1].tolist() == [0] * 4
    assert found.coefficients[1].tolist() == [0] * 4
    without = pursue(vectors, atoms[2:], 4, method)
    torch.testing.assert_close(found.energy, without.energy)
    torch.testing.assert_close(found.coefficients, without.coefficients)
    assert (found.energy[[0, 2], 0] > 0).all()
    nothing = pursue(vectors, torch.zeros(5, 6), 2, method)
    assert nothing.coefficients.abs().max() == 0
    assert nothing.energy.abs().max() == 0


def test_random_atoms_explain_what_chance_does():
    """The square of a cosine with a random direction is Beta(1/2, (d - 1)/2); the first step takes the largest of K."""
    count, width = 300, 24
    atoms = random_atoms(torch.empty(count, width), seed=3)
    law = stats.beta(0.5, (width - 1) / 2)
    expected = integrate.quad(lambda x: 1 - law.cdf(x) ** count, 0, 1)[0]
    for method in ("matching pursuit", "orthogonal"):
        assert float(pursue(normal(3000, width), atoms, 1, method).energy.mean()) == pytest.approx(expected, rel=0.03)


def test_random_atoms_depend_on_the_seed_only():
    like = torch.zeros(50, 7, dtype=torch.bfloat16)
    atoms = random_atoms(like, seed=0)
    assert atoms.shape == like.shape
    assert atoms.dtype == like.dtype
    assert atoms.equal(random_atoms(like, seed=0))
    assert not atoms.equal(random_atoms(like, seed=1))
    assert float(unit(atoms.double()).mean(dim=0).norm()) < 4 / math.sqrt(50)
