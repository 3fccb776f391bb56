import numpy as np
import torch

from analysis.evaluation.metrics.cosine import centred_cosine, flat_cosine, token_cosine

PREDICTION, TARGET = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
MEAN = TARGET.mean(0) + 0.3


def cosine(a, b):
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_strict_is_the_mean_over_tokens():
    p, t = PREDICTION.numpy(), TARGET.numpy()
    expected = [np.mean([cosine(p[i, n], t[i, n]) for n in range(5)]) for i in range(3)]
    np.testing.assert_allclose(token_cosine(PREDICTION, TARGET), expected, rtol=1e-5)


def test_centred_takes_the_mean_from_both():
    p, t = (PREDICTION - MEAN).numpy(), (TARGET - MEAN).numpy()
    expected = [np.mean([cosine(p[i, n], t[i, n]) for n in range(5)]) for i in range(3)]
    np.testing.assert_allclose(centred_cosine(PREDICTION, TARGET, MEAN), expected, rtol=1e-5)


def test_paper_is_one_cosine_over_the_flattened_feature():
    expected = [cosine(p.ravel(), t.ravel()) for p, t in zip(PREDICTION.numpy(), TARGET.numpy(), strict=True)]
    np.testing.assert_allclose(flat_cosine(PREDICTION, TARGET), expected, rtol=1e-5)


def test_the_mean_target_scores_zero_when_centred():
    assert centred_cosine(MEAN.expand_as(TARGET), TARGET, MEAN).tolist() == [0.0, 0.0, 0.0]
