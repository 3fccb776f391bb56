"""The distances against closed forms and independent formulas."""

import numpy as np
import pytest
import scipy.linalg

import probing.utils.torchvision_shim  # noqa: F401
from analysis.evaluation.generated_images.distances import (
    Gaussian,
    frechet_distance,
    frechet_jackknife,
    kernel_distances,
    squared_mmd,
    subset_spread,
)
from analysis.evaluation.jackknife import Jackknife


def test_it_is_the_closed_form_for_diagonal_gaussians():
    rng = np.random.default_rng(0)
    m1, m2, v1, v2 = rng.normal(size=(4, 32))
    one, two = Gaussian(m1, np.diag(v1**2)), Gaussian(m2, np.diag(v2**2))
    expected = ((m1 - m2) ** 2).sum() + ((abs(v1) - abs(v2)) ** 2).sum()
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)


def features(rng, n=500, width=64):
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)), rng.normal(size=(n, width)) + 0.3


def test_it_equals_the_matrix_root():
    one, two = map(Gaussian.fit, features(np.random.default_rng(1)))
    root = scipy.linalg.sqrtm(one.covariance @ two.covariance).real
    expected = ((one.mean - two.mean) ** 2).sum() + np.trace(one.covariance + two.covariance - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9 * np.trace(one.covariance))


def test_it_equals_pytorch_fids_own_function():
    from pytorch_fid.fid_score import calculate_frechet_distance

    one, two = map(Gaussian.fit, features(np.random.default_rng(9)))
    expected = calculate_frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-6)


def test_directions_without_variance_change_nothing():
    """Covariances of fewer images than features are singular; a matrix root by Schur's method fails there."""
    rng = np.random.default_rng(2)
    x, y = features(rng, width=16)
    wide = np.linalg.qr(rng.normal(size=(80, 80)))[0][:16]
    expected = frechet_distance(Gaussian.fit(x), Gaussian.fit(y))
    assert frechet_distance(Gaussian.fit(x @ wide), Gaussian.fit(y @ wide)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(12, 90), (90, 12), (9, 20), (90, 90)])
def test_fewer_images_than_features_take_the_same_distance(n, m):
    x, y = features(np.random.default_rng(n), n=200, width=40)
    one, two = Gaussian.fit(x[:n]), Gaussian.fit(y[:m])
    plain = frechet_distance(*(Gaussian(g.mean, g.covariance) for g in (one, two)))
    assert frechet_distance(one, two) == pytest.approx(plain, rel=1e-6)


def test_the_covariance_is_the_unbiased_one():
    x = np.random.default_rng(2).normal(size=(30, 5))
    centred = x - x.mean(0)
    np.testing.assert_allclose(Gaussian.fit(x).covariance, centred.T @ centred / 29)


def test_kid_is_the_unbiased_estimate_summed_pair_by_pair():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) + 1

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within = [kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j]
    between = [kernel(a, b) for a in x for b in y]
    assert squared_mmd(x, y) == pytest.approx(sum(within) / 30 - 2 * sum(between) / 36, rel=1e-12)


def test_kid_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = features(np.random.default_rng(5), n=60)
    expected = kernel_mmd(x, y, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-6)


def test_kid_of_one_distribution_is_zero_within_its_spread():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 800, 16))
    same = subset_spread(kernel_distances(x, y, subsets=50, subset_size=200))
    assert same.low < 0 < same.high
    assert kernel_distances(x, y + 1, subsets=50, subset_size=200).mean() > 10 * (same.high - same.low)


def test_sub_samples_differ_even_when_there_are_few_images():
    x, y = np.random.default_rng(6).normal(size=(2, 20, 4))
    assert np.std(kernel_distances(x, y, subsets=10)) > 0


def test_jackknife_covers_distance_and_narrows_with_images():
    """Of 60 draws from one distribution against a fixed other, about 95 % of the intervals hold what the mean draw is.

    The distance of n images has a bias, which an interval of that distance does not cover; so the reference
    point is the mean over draws, not the limit of infinitely many images.
    """
    rng = np.random.default_rng(7)
    reference = Gaussian(np.zeros(4), np.eye(4))
    intervals = [frechet_jackknife(rng.normal(0.5, 1.5, size=(1, 200, 4)), reference).interval() for _ in range(60)]
    centre = np.mean([i.value for i in intervals])
    assert 0.85 <= np.mean([i.low <= centre <= i.high for i in intervals]) <= 1
    wide = frechet_jackknife(rng.normal(0.5, 1.5, size=(1, 3200, 4)), reference).interval()
    assert 2.5 < np.mean([i.high - i.low for i in intervals]) / (wide.high - wide.low) < 6.5


def test_seeds_widen_the_interval_and_layers_are_averaged():
    rng = np.random.default_rng(8)
    reference, x = Gaussian(np.zeros(3), np.eye(3)), rng.normal(size=(100, 3))
    one = frechet_jackknife(np.stack([x, x + 1]), reference)
    assert one.interval().high - one.interval().low > 5 * np.ptp(
        [frechet_jackknife(x[None], reference).interval().high, frechet_jackknife(x[None], reference).interval().low]
    )
    layers = [frechet_jackknife(x[None] + shift, reference) for shift in (0, 1)]
    expected = np.mean([frechet_distance(Gaussian.fit(x + shift), reference) for shift in (0, 1)])
    assert Jackknife.mean(layers).interval().value == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.full((5, 4), np.nan), np.zeros(4)])
def test_features_that_fit_no_gaussian(bad):
    with pytest.raises(ValueError, match="Gaussian"):
        Gaussian.fit(bad)
