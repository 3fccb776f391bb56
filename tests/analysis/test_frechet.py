"""The distances against closed forms and independent formulas."""

import numpy as np
import pytest
import scipy.linalg

from analysis.frechet import Gaussian, frechet_distance, kernel_distance, squared_mmd


def test_it_is_the_closed_form_for_diagonal_gaussians():
    rng = np.random.default_rng(0)
    m1, m2, v1, v2 = rng.normal(size=(4, 32))
    one, two = Gaussian(m1, np.diag(v1**2), 10), Gaussian(m2, np.diag(v2**2), 10)
    expected = ((m1 - m2) ** 2).sum() + ((abs(v1) - abs(v2)) ** 2).sum()
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)


def features(rng, n=500, width=64):
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)), rng.normal(size=(n, width)) + 0.3


def test_it_equals_the_matrix_root():
    one, two = map(Gaussian.of, features(np.random.default_rng(1)))
    root = scipy.linalg.sqrtm(one.covariance @ two.covariance).real
    expected = ((one.mean - two.mean) ** 2).sum() + np.trace(one.covariance + two.covariance - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9 * np.trace(one.covariance))


def test_directions_without_variance_change_nothing():
    """Covariances of fewer images than features are singular; a matrix root by Schur's method fails there."""
    rng = np.random.default_rng(2)
    x, y = features(rng, width=16)
    wide = np.linalg.qr(rng.normal(size=(80, 80)))[0][:16]
    expected = frechet_distance(Gaussian.of(x), Gaussian.of(y))
    assert frechet_distance(Gaussian.of(x @ wide), Gaussian.of(y @ wide)) == pytest.approx(expected, rel=1e-6)


def test_the_covariance_is_the_unbiased_one():
    x = np.random.default_rng(2).normal(size=(30, 5))
    centred = x - x.mean(0)
    np.testing.assert_allclose(Gaussian.of(x).covariance, centred.T @ centred / 29)


def test_kid_is_the_unbiased_estimate_summed_pair_by_pair():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) + 1

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within = [kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j]
    between = [kernel(a, b) for a in x for b in y]
    assert squared_mmd(x, y) == pytest.approx(sum(within) / 30 - 2 * sum(between) / 36, rel=1e-12)


def test_kid_is_about_zero_for_one_distribution_and_says_its_spread():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 800, 16))
    same = kernel_distance(x, y, subsets=50, subset_size=200)
    assert abs(same.value) < 2 * same.spread
    assert kernel_distance(x, y + 1, subsets=50, subset_size=200).value > 10 * same.spread


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.full((5, 4), np.nan), np.zeros(4)])
def test_features_that_fit_no_gaussian(bad):
    with pytest.raises(ValueError, match="Gaussian"):
        Gaussian.of(bad)
