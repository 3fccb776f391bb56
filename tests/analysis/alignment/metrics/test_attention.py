"""Attention to the image, on cases with known answers."""

import numpy as np
import pytest
import torch

from analysis.alignment.metrics.attention import attention_share


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks():
    image, query = torch.zeros(2, 10, dtype=torch.bool), torch.zeros(2, 10, dtype=torch.bool)
    image[0, 1:5] = image[1, 2:9] = True
    query[0, 6:] = query[1, 9] = True
    return image, query


def test_uniform_attention_is_the_share_of_positions():
    image, query = masks()
    uniform = torch.full((2, 4, 10, 10), 0.1, dtype=torch.float64)
    np.testing.assert_allclose(attention_share(uniform, image, query), [0.4, 0.7], rtol=1e-12)
    causal = torch.ones(10, 10, dtype=torch.float64).tril()
    causal = (causal / causal.sum(1, keepdim=True)).expand(2, 4, 10, 10)
    expected = [np.mean([4 / (q + 1) for q in range(6, 10)]), 0.7]
    np.testing.assert_allclose(attention_share(causal, image, query), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_share_equals_a_plain_sum(dtype):
    image, query = masks()
    attention = normal(2, 3, 10, 10).softmax(-1).to(dtype)
    expected = [
        np.mean(
            [float(attention[b, h, q, image[b]].double().sum()) for h in range(3) for q in range(10) if query[b, q]]
        )
        for b in range(2)
    ]
    found = attention_share(attention, image, query)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_other_rows_do_not_matter():
    image, query = masks()
    attention = normal(2, 3, 10, 10).softmax(-1)
    expected = attention_share(attention, image, query)
    attention[:, :, 0] = torch.nan
    torch.testing.assert_close(attention_share(attention, image, query), expected)


def test_all_or_none_of_the_attention():
    _, query = masks()
    attention = normal(2, 3, 10, 10).softmax(-1)
    everything = torch.ones(2, 10, dtype=torch.bool)
    np.testing.assert_allclose(attention_share(attention, everything, query), [1, 1], rtol=1e-12)
    np.testing.assert_allclose(attention_share(attention, ~everything, query), [0, 0])
