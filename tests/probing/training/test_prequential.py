"""Errors on images before probes are trained on them, and the code length that follows from them."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import norm
from sklearn.linear_model import Ridge

import probing
from analysis.evaluation.metrics.code_length import bits_saved
from analysis.evaluation.scores import ScoreFile, ScoreKey
from probing.probes.ridge import RidgeSums, resize_states
from probing.training.schedule import plan_steps
from probing.utils.errors import UserError
from probing.utils.interrupt import Interrupted
from tests.helpers.trainer import make_trainer


@pytest.fixture
def values(recipe_values):
    """Values of a recipe with batches of two images."""
    recipe_values["fit"] |= {"batch_size": 2, "micro_batch": 2, "epochs": 2, "ridge": True}
    return recipe_values | {"layers": "0,2", "controls": ["random"]}


def direct_bits(order, states, targets, constants):
    """Fits scikit-learn's ridge again on all earlier parts; SciPy's density gives the bits saved by image."""
    bits, starts = {}, [2 * 2**j for j in range(10) if 2 * 2**j < len(order)]
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        x = torch.cat([states[i] for i in order[:start]]).numpy()
        y = torch.cat([targets[i] for i in order[:start]]).numpy()
        spread = max(np.var(x, axis=0).mean(), 2**-23 * np.square(x).mean())
        ridge = Ridge(alpha=1e-3 * len(x) * spread, solver="cholesky").fit(x, y)
        mean = torch.stack([targets[i] for i in order[:start]]).mean(0).numpy()
        ahead = np.stack([targets[i].numpy() for i in order[start:stop]])
        mean = min(constants(mean), key=lambda constant, ahead=ahead: np.square(ahead - constant).sum())
        residuals = {i: targets[i].numpy() - ridge.predict(states[i].numpy()) for i in order[start:stop]}
        deviations = {i: targets[i].numpy() - mean for i in order[start:stop]}
        scales = [np.sqrt(np.mean(np.square(list(rows.values())))) for rows in (residuals, deviations)]
        for i in order[start:stop]:
            nats = norm.logpdf(residuals[i], scale=scales[0]).sum() - norm.logpdf(deviations[i], scale=scales[1]).sum()
            bits[i] = nats / np.log(2)
    return bits


def test_code_length_equals_a_direct_computation(values, tmp_path):
    """Of features from image tokens, and of mean features from the image, from the text and from the last token."""
    values["fit"]["positions"] = ["image", "text", "last"]
    run = probing.train(values, tmp_path / "run")
    trainer = make_trainer(values, tmp_path / "unused")
    steps = [step for step in plan_steps(len(trainer.images), trainer.recipe.fit) if step.first]
    order = [image for step in steps for micro in step.micros for image in micro]
    states, targets = {name: {} for name in ("", "image", "text", "last")}, {}
    for prepared in trainer.batches(steps):
        batch = prepared.student
        targets |= dict(zip(prepared.indices, prepared.target(trainer.teachers["seg"]).double(), strict=True))

        def keep(layer, hidden, batch=batch, prepared=prepared):
            patches = batch.tokens.image_states(hidden)
            text, padded = batch.tokens.select(hidden, ["text"])
            assert padded is None and layer == 2
            found = {"": resize_states(patches, batch.tokens.grid, trainer.teachers["seg"].grid)}
            found |= {
                "image": patches.mean(1, keepdim=True),
                "text": text.mean(1, keepdim=True),
                "last": hidden[:, -1:],
            }
            for name, own in found.items():
                states[name].update(zip(prepared.indices, own.double(), strict=True))

        with torch.no_grad():
            trainer.backbone.stream(batch, [2], keep)
    means = {image: target.mean(0, keepdim=True) for image, target in targets.items()}
    table = probing.evaluate(run, metrics=["code_length"])
    scores = ScoreFile.read(run.path / "scores" / "code_length-train2017.safetensors")
    for position, own in states.items():
        if position:
            metric, expected = "code_length_mean", direct_bits(order, own, means, lambda mean: [mean])
        else:
            constants = lambda mean: [mean, mean.mean(axis=0)]  # noqa: E731
            metric, expected = "code_length", direct_bits(order, own, targets, constants)
        expected = {trainer.images.names[image]: bits for image, bits in expected.items()}
        found = scores.table[ScoreKey("seg", "2", "ridge", "none", metric, "strict", position)]
        assert len(found) == len(order) - 2
        bits = [expected[name] for name in scores.names]
        numbers = (means if position else targets)[order[0]].numel()
        # Bits may cancel; each number adds about one on either side, from a squared error in float32.
        np.testing.assert_allclose(found, bits, rtol=1e-6, atol=2**-23 * numbers)
        row = table[(table.metric == metric) & (table.teacher == "seg") & (table.layer == "2")]
        row = row[(row.probe == "ridge") & (row.control == "none") & (row.variant == position)].iloc[0]
        assert row.value == pytest.approx(np.mean(list(expected.values())), rel=1e-6) and row.n == len(expected)
    assert set(table[table.metric == "code_length"].control) == {"none", "random"}
    text = table[(table.metric == "code_length_mean") & (table.layer == "0") & table.variant.isin(["text", "last"])]
    assert len(text) == 12 and text.value.abs().max() < 1e-3  # the prompt is the same for every image


def test_positions_must_exist(values, tmp_path):
    values["fit"]["positions"] = ["special"]
    with pytest.raises(UserError, match="no special tokens"):
        probing.train(values, tmp_path / "run")


def test_known_predictions_save_known_bits():
    """A prediction as good as the mean saves nothing; half the error saves one bit per number, in each part."""
    generator = np.random.default_rng(0)
    mean, parts = generator.chisquare(50, size=60), np.repeat([0, 1, 2], 20)
    constants = np.stack([mean, 2 * mean])
    np.testing.assert_allclose(bits_saved(mean, constants, parts, 50), 0, atol=1e-12)
    np.testing.assert_allclose(bits_saved(mean / 4, constants, parts, 50), 50)
    exact = bits_saved(0 * mean, constants, parts, 50).reshape(3, 20).mean(axis=1)
    np.testing.assert_allclose(exact, 50 * (10 + 0.5 / np.log(2)))  # coded to ten bits below the mean target's spread
    hole = np.where(np.arange(60) == 7, np.nan, mean / 4)
    assert np.isnan(bits_saved(hole, constants, parts, 50)).nonzero()[0].tolist() == [7]


@pytest.mark.parametrize("images", [40, 160])
def test_shuffled_targets_cost_the_bits_of_overfitting(images):
    """Inputs that say nothing add their leverage, known from the inputs alone, to the expected squared error."""
    generator, width, size = torch.Generator().manual_seed(0), 16, 4000
    x, y = torch.randn(2000, 1, width, generator=generator), torch.randn(2000, 1, size, generator=generator)
    sums = RidgeSums()
    sums.add(x[:images], {"a": y[:images]}, torch.ones(images).bool())
    weight, bias = sums.solve(1e-12)["a"]
    errors = (x[images:].double() @ weight.T + bias - y[images:]).square().sum(dim=(1, 2)).numpy()
    mean_errors = (y[:images].mean(dim=0) - y[images:]).double().square().sum(dim=(1, 2)).numpy()
    saved = bits_saved(errors, mean_errors[None], np.zeros(len(errors), dtype=int), size).mean()
    seen, new = x[:images, 0].double().numpy(), x[images:, 0].double().numpy()
    covariance = np.cov(seen.T, bias=True)
    distance = np.einsum("ij,ij->i", new - seen.mean(0), np.linalg.solve(covariance, (new - seen.mean(0)).T).T)
    grown = (1 + (1 + distance.mean()) / images) / (1 + 1 / images)
    assert saved == pytest.approx(-size / 2 * np.log2(grown), rel=0.02)


def test_stopped_training_resumes_to_the_same_errors(values, tmp_path):
    whole = make_trainer(values, tmp_path / "whole")
    errors = whole.run().prequential.errors
    assert all(torch.isfinite(series).sum() == len(whole.images) - 2 for series in errors.values())
    stopped = make_trainer(values, tmp_path / "stopped", save_minutes=0)
    take, taken = type(stopped).take_step, []

    def stop(self, *arguments):
        taken.append(1)
        if len(taken) == 4:
            raise Interrupted
        return take(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stopped), "take_step", stop)
        with pytest.raises(Interrupted):
            stopped.run()
    resumed = make_trainer(values, tmp_path / "stopped").run().prequential
    assert resumed.errors.keys() == errors.keys()
    for key, series in errors.items():
        assert torch.equal(series.nan_to_num(-1), resumed.errors[key].nan_to_num(-1)), key


def test_missing_errors_or_images_are_one_line(values, tmp_path):
    data = shutil.copytree(values["data"]["path"].removeprefix("coco:"), tmp_path / "coco")
    run = probing.train(values | {"controls": [], "data": {"path": f"coco:{data}"}}, tmp_path / "run")
    recorded = run.errors("none").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="train a new run"):
        probing.evaluate(run, metrics=["code_length"])
    recorded.rename(run.errors("none"))
    next((data / "train2017").iterdir()).unlink()
    with pytest.raises(UserError, match="train2017 have changed"):
        probing.evaluate(run, metrics=["code_length"])


def test_errors_file_names_the_part_of_each_image(values, tmp_path):
    run = probing.train(values | {"controls": []}, tmp_path / "run")
    stored = load_file(run.errors("none"))
    parts = stored.pop("parts")
    assert sorted(parts)[:2] == [-1, -1] and parts.max() == int(np.log2((len(parts) - 1) // 2))
    for name, values_ in stored.items():
        assert (np.isfinite(values_) == (parts >= 0)).all(), name


def test_a_single_batch_is_announced_and_measures_nothing(values, tmp_path, caplog):
    values["fit"] |= {"batch_size": 1000}
    run = probing.train(values | {"controls": []}, tmp_path / "run")
    assert "all training images are one batch, so code_length is not measured" in caplog.text
    with pytest.raises(UserError, match="more than one batch"):
        probing.evaluate(run, metrics=["code_length"])
