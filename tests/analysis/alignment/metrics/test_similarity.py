"""Likeness, anisotropy and attention on cases with known answers, and at chance."""

import itertools

import numpy as np
import pytest
import torch

from analysis.alignment.metrics import similarity
from analysis.alignment.metrics.attention import attention_share
from analysis.alignment.metrics.similarity import anisotropy, linear_cka, neighbour_overlap, overlap_at_chance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=1):
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


def hsic(k, l):  # noqa: E741
    """The unbiased estimator as a mean over tuples of different items: pairs, quadruples and triples."""
    n = len(k)
    pairs = np.mean([k[i, j] * l[i, j] for i, j in itertools.permutations(range(n), 2)])
    quadruples = np.mean([k[i, j] * l[q, r] for i, j, q, r in itertools.permutations(range(n), 4)])
    triples = np.mean([k[i, j] * l[i, q] for i, j, q in itertools.permutations(range(n), 3)])
    return pairs + quadruples - 2 * triples


def test_cka_is_the_unbiased_estimator_summed_tuple_by_tuple():
    x, y = normal(7, 3) + 1, normal(7, 5, seed=1)
    y[:, :2] += x[:, :2]
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()  # noqa: E741
    expected = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)


def test_cka_is_song_and_others_formula_of_traces():
    x, y = normal(40, 3), normal(40, 60, seed=1)
    y[:, :3] += 2 * x

    def traces(k, l):  # noqa: E741
        k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
        n, one = len(k), torch.ones(len(k), dtype=k.dtype)
        middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return ((k @ l).trace() + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = float(traces(k, l) / (traces(k, k) * traces(l, l)).sqrt())
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(x + 1e7, y - 1e7) == pytest.approx(expected, rel=1e-6)


def test_cka_is_one_for_the_same_representation_turned_scaled_or_shifted():
    x = normal(50, 20)
    for same in (x, -3 * x, x @ rotation(20), x + 5, torch.cat([x, torch.ones(50, 9)], dim=1), x.float()):
        assert linear_cka(x, same) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, x @ normal(20, 20, seed=2)) < 0.99


@pytest.mark.parametrize("widths", [(5, 7), (200, 300)])
def test_cka_of_independent_representations_is_about_zero(widths):
    drawn = [linear_cka(normal(30, widths[0], seed=s), normal(30, widths[1], seed=s + 99)) for s in range(20)]
    assert abs(np.mean(drawn)) < 3 * np.std(drawn, ddof=1) / np.sqrt(20)
    assert min(drawn) < 0 < max(drawn)


def test_cka_of_what_tells_no_items_apart_is_zero():
    x = normal(30, 8)
    assert linear_cka(x, torch.full((30, 8), 0.1)) == 0
    assert linear_cka(x, torch.zeros(30, 8)) == 0
    alone = torch.full((30, 8), 0.1)
    alone[3] = 0.7
    assert linear_cka(x, alone) == 0


def test_neighbours_stay_where_nothing_or_only_direction_of_axes_changes():
    x = normal(40, 12)
    for same in (x, 5 * x, x @ rotation(12), x * torch.rand(40, 1, generator=torch.Generator().manual_seed(0))):
        assert neighbour_overlap(x, same, 7).tolist() == [1.0] * 40


def test_overlap_is_counted_item_by_item(monkeypatch):
    monkeypatch.setattr(similarity, "ROWS_AT_ONCE", 7)
    one, other = normal(25, 6), normal(25, 9, seed=1)
    other[:, :6] += one

    def near(x, i):
        x = (x / x.norm(dim=1, keepdim=True)).numpy()
        distance = np.linalg.norm(x - x[i], axis=1)  # Euclidean, of unit rows
        return {int(j) for j in np.argsort(distance) if j != i and np.sum(distance < distance[j]) <= 4}

    expected = [len(near(one, i) & near(other, i)) / 4 for i in range(25)]
    found = neighbour_overlap(one, other, 4)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected)
    assert 0.2 < np.mean(expected) < 0.9


def test_independent_representations_keep_neighbours_at_the_rate_of_chance():
    drawn = [float(neighbour_overlap(normal(60, 8, seed=s), normal(60, 30, seed=s + 99), 10).mean()) for s in range(20)]
    assert overlap_at_chance(60, 10) == pytest.approx(10 / 59)
    assert abs(np.mean(drawn) - 10 / 59) < 3 * np.std(drawn, ddof=1) / np.sqrt(20)
    assert neighbour_overlap(normal(9, 3), normal(9, 3, seed=1), 8).tolist() == [1.0] * 9  # chance is 1 there


def test_representations_that_do_not_fit_are_refused():
    x = normal(10, 3)
    for measure in (linear_cka, lambda a, b: neighbour_overlap(a, b, 2)):
        for other in (normal(9, 3), normal(10), normal(1, 10, 3)):
            with pytest.raises(ValueError, match="two representations"):
                measure(x, other)
        with pytest.raises(ValueError, match="not finite"):
            measure(x, x * torch.inf)
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(x[:3], x[:3])
    for k in (0, 10):
        with pytest.raises(ValueError, match="neighbours"):
            neighbour_overlap(x, x, k)


def test_anisotropy_is_the_mean_over_all_pairs():
    tokens = normal(2, 3, 9, 5) + 0.4
    tokens[1, 2, 4] = 0
    found = anisotropy(tokens)
    assert found.shape == (2, 3)
    assert found.dtype == torch.float64
    for place in itertools.product(range(2), range(3)):
        x = tokens[place]
        pairs = [torch.cosine_similarity(x[i], x[j], dim=0) for i, j in itertools.permutations(range(9), 2)]
        assert float(found[place]) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-9)


def test_anisotropy_of_known_cases():
    assert float(anisotropy(torch.eye(6))) == pytest.approx(0, abs=1e-12)
    assert float(anisotropy((normal(8, 1).abs() + 0.1) @ normal(1, 5, seed=1))) == pytest.approx(1, abs=1e-6)
    assert float(anisotropy(torch.eye(6) - 1 / 6)) == pytest.approx(-1 / 5, abs=1e-6)
    chance = anisotropy(torch.stack([normal(50, 30, seed=s) for s in range(20)]))
    assert abs(float(chance.mean())) < 3 * float(chance.std()) / np.sqrt(20)
    assert float(chance.std()) == pytest.approx(np.sqrt(2 / (50 * 49 * 30)), rel=0.5)
    for wrong in (torch.ones(1, 4), torch.ones(4), torch.full((3, 4), torch.inf)):
        with pytest.raises(ValueError, match="anisotropy"):
            anisotropy(wrong)


def masks():
    image, query = torch.zeros(2, 10, dtype=torch.bool), torch.zeros(2, 10, dtype=torch.bool)
    image[0, 1:5] = image[1, 2:9] = True
    query[0, 6:] = query[1, 9] = True
    return image, query


def test_uniform_attention_falls_on_the_image_by_its_share_of_positions():
    image, query = masks()
    uniform = torch.full((2, 4, 10, 10), 0.1, dtype=torch.float64)
    np.testing.assert_allclose(attention_share(uniform, image, query), [0.4, 0.7], rtol=1e-12)
    causal = torch.ones(10, 10, dtype=torch.float64).tril()
    causal = (causal / causal.sum(1, keepdim=True)).expand(2, 4, 10, 10)
    expected = [np.mean([4 / (q + 1) for q in range(6, 10)]), 0.7]
    np.testing.assert_allclose(attention_share(causal, image, query), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_share_is_summed_head_by_head(dtype):
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
    alone = attention_share(attention[0], image[0], query[0])
    assert alone.shape == ()
    assert float(alone) == pytest.approx(expected[0])
    np.testing.assert_allclose(
        attention_share(attention[:1].expand(2, 3, 10, 10), image[0], query[0]), expected[:1] * 2, rtol=1e-12
    )


def test_rows_that_were_not_asked_for_do_not_matter():
    image, query = masks()
    attention = normal(2, 3, 10, 10).softmax(-1)
    expected = attention_share(attention, image, query)
    attention[:, :, 0] = torch.nan
    torch.testing.assert_close(attention_share(attention, image, query), expected)


def test_all_or_none_of_the_attention():
    _, query = masks()
    attention = normal(2, 3, 10, 10).softmax(-1)
    everything = torch.ones(10, dtype=torch.bool)
    np.testing.assert_allclose(attention_share(attention, everything, query), [1, 1], rtol=1e-12)
    np.testing.assert_allclose(attention_share(attention, ~everything, query), [0, 0])


def test_attention_that_does_not_fit_is_refused():
    image, query = masks()
    attention = torch.full((2, 4, 10, 10), 0.1)
    with pytest.raises(ValueError, match="attention is"):
        attention_share(attention[0, 0], image[0], query[0])
    with pytest.raises(ValueError, match="the mask of keys"):
        attention_share(attention[..., :9], image, query)
    with pytest.raises(ValueError, match="the mask of queries"):
        attention_share(attention[..., :9, :], image, query)
    with pytest.raises(ValueError, match="the mask of keys"):
        attention_share(attention[0], image, query)
    with pytest.raises(ValueError, match="the mask of keys"):
        attention_share(attention, image.long(), query)
    with pytest.raises(ValueError, match="no query"):
        attention_share(attention, image, query & False)
