"""`probing erase`."""

import itertools
import json

import numpy as np
import pytest
import torch
from concept_erasure import LeaceEraser
from sklearn.linear_model import LinearRegression
from transformers import AutoModelForImageTextToText

import probing
from analysis.erasure import run as erasure
from analysis.erasure.captions import AnsweredInputs, score_answers
from analysis.erasure.erasers import solve
from analysis.erasure.replay import Replay
from analysis.evaluation.scores import ScoreFile
from probing.models import load_backbone
from probing.probes.ridge import RidgeSums
from probing.recipe import BackboneRecipe
from probing.toyworld import planted
from probing.toyworld.language import vocabulary
from probing.utils.errors import UserError
from tests.helpers.cli import error_line
from tests.helpers.cli import probing as command

CPU = torch.device("cpu")
WIDTH, RANK = 12, 3


@pytest.fixture(scope="module")
def data():
    """Correlated states (n, H), and features (n, r) of which states hold a part."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator) + 5
    noise = torch.randn(600, RANK, generator=generator)
    return states, states @ torch.randn(WIDTH, RANK, generator=generator) + 2 * noise


def fitted(states, features):
    """The erasers, from sums over batches of ten."""
    sums, others = RidgeSums(), features.roll(1, dims=0)
    for rows in torch.arange(len(states)).split(10):
        batch = {"a": features[rows, None], "a/shuffled": others[rows, None]}
        sums.add(states[rows, None], batch, torch.ones(len(rows)).bool())
    return {control: eraser for (_, control), eraser in solve(sums.sums, ["a"])}


def explained(states, features):
    """R² of a linear regression."""
    return LinearRegression().fit(states, features).score(states, features)


def test_erasers_are_those_of_the_package_and_erase_all_that_is_linear(data):
    states, features = data
    erasers = fitted(states, features)
    whole = LeaceEraser.fit(
        states.double(), features.double(), shrinkage=False, constrain_cov_trace=False, svd_tol=1e-9
    )
    erased = erasers["none"](states)
    torch.testing.assert_close(erased, whole(states.double()).float(), rtol=1e-4, atol=1e-4)
    assert explained(states, features) > 0.5 and explained(erased, features) < 1e-6
    torch.testing.assert_close(erasers["none"](erased), erased, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(erased.mean(dim=0), states.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_random_subspace_has_the_same_rank_and_change(data):
    states, features = data
    erasers = fitted(states, features)
    change = {name: eraser(states) - states for name, eraser in erasers.items()}
    for one in change.values():
        assert torch.linalg.matrix_rank(one, rtol=1e-4) == RANK
    energy = {name: one.square().sum().item() for name, one in change.items()}
    assert energy["subspace"] == pytest.approx(energy["none"], rel=1e-4)
    assert explained(erasers["subspace"](states), features) > 0.2


def test_what_is_no_more_readable_than_other_images_features_is_not_erased(data):
    states, features = data
    unrelated = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    sums = RidgeSums()
    sums.add(states[:, None], {"a": unrelated[:, None], "a/shuffled": features[:, None]}, torch.ones(600).bool())
    for _, eraser in solve(sums.sums, ["a"]):
        assert torch.equal(eraser(states), states)


@pytest.fixture(scope="module")
def model(models):
    """A tiny checkpoint with its head, its recipe, and inputs of three images with captions."""
    recipe = BackboneRecipe(checkpoint=str(models["llava"]))
    backbone = load_backbone(recipe, CPU, with_head=True)
    generator = np.random.default_rng(0)
    images = [read_image_of(generator) for _ in range(3)]
    captions = ["a cat", "two red cars on a street", "a"]
    return backbone, recipe, images, captions


def read_image_of(generator):
    """A random image."""
    from PIL import Image

    return Image.fromarray(generator.integers(0, 255, (48, 48, 3), dtype=np.uint8))


def test_losses_are_those_of_transformers(model, models):
    backbone, recipe, images, captions = model
    batch = AnsweredInputs(backbone.prepare, recipe, None)(list(zip(images, captions, strict=True)))
    final = Replay.record(backbone, batch, [1]).states["final"]
    answer = batch.tokens.mask("answer")
    losses, right = score_answers(final, backbone.head, batch.inputs["input_ids"], answer)
    reference = AutoModelForImageTextToText.from_pretrained(models["llava"])
    for row, caption in enumerate(captions):
        inputs = {name: value[row : row + 1] for name, value in batch.inputs.items()}
        labels = inputs["input_ids"].masked_fill(~answer[row], -100)
        with torch.no_grad():
            expected = reference(**inputs, labels=labels)
        assert losses[row].item() == pytest.approx(expected.loss.item(), rel=1e-4)
        assert caption in backbone.prepare.processor.decode(inputs["input_ids"][0][answer[row]])
        hits = expected.logits[0, :-1].argmax(-1)[answer[row, 1:]] == inputs["input_ids"][0, 1:][answer[row, 1:]]
        assert right[row].item() == pytest.approx(hits.float().mean().item())


def test_replay_from_any_layer_ends_as_the_pass_did(model):
    backbone, recipe, images, captions = model
    batch = AnsweredInputs(backbone.prepare, recipe, None)(list(zip(images, captions, strict=True)))
    layers = [*range(backbone.layers + 1), "final"]
    replay = Replay.record(backbone, batch, layers)
    for layer in layers:
        torch.testing.assert_close(replay.final_from(layer, replay.states[layer]), replay.states["final"])
    changed = replay.states[1].clone()
    changed[:, 0] += 1
    assert not torch.allclose(replay.final_from(1, changed), replay.states["final"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_erasure_hurts_exactly_where_the_planted_function_is_used(tmp_path, seed):
    """At image tokens from where the products are computed until they are moved, at the text from then on.

    Controls hurt less. Of the text nothing but the products differs between images, so that there the features of other
    images erase them just as well.
    """
    world = planted.write_planted(tmp_path, 240, 60, seed)
    fit = {"epochs": 1, "batch_size": 16, "micro_batch": 16, "workers": 0, "report_to": "none"}
    recipe = {
        "backbone": {"checkpoint": str(world.checkpoint), "prompt": " ".join(vocabulary())},
        "data": {"path": f"coco:{world.data}"},
        "teachers": {"products": {"id": str(world.teacher)}}, "layers": "all", "controls": [], "fit": fit,
    }  # fmt: skip
    table = probing.erase(probing.train(recipe, tmp_path / "run"), positions=["image", "text", "all"])
    used = {"image": range(planted.COMPUTED, planted.MOVED), "text": range(planted.MOVED, planted.LAYERS + 1)}
    used["all"] = range(planted.COMPUTED, planted.LAYERS + 1)
    rows = table[(table.layer != "mean") & (table.layer != "")]
    keys = zip(rows.metric, rows.variant, rows.layer.astype(int), rows.control, strict=True)
    found = dict(zip(keys, rows.itertuples(), strict=True))
    for position, layer in itertools.product(used, range(planted.LAYERS + 1)):
        own = {name: found[f"erased_{name}", position, layer, "none"] for name in ("loss", "accuracy", "excess")}
        if layer in used[position]:
            assert own["loss"].ci_low > 0.5 and own["accuracy"].ci_high < -0.2 and own["excess"].ci_low > 0.2, own
        else:
            assert all(abs(row.value) < 1e-3 for row in own.values()), own
        for control in ("subspace", "shuffled") if position == "image" else ("subspace",):
            assert found["erased_loss", position, layer, control].ci_high < max(own["loss"].ci_low, 1e-3), own
    ranks = {position: [found["erased_rank", position, layer, "none"].value for layer in range(9)] for position in used}
    assert ranks["image"][: planted.ERASED] == [0, 0] + 4 * [planted.PRODUCTS]  # later on it is rounding
    assert ranks["text"] == 4 * [0] + 5 * [planted.PRODUCTS]


@pytest.fixture
def run(recipe_values, tmp_path):
    """A finished run of a tiny checkpoint."""
    values = recipe_values | {"controls": []}
    values["fit"] |= {"epochs": 1, "report_to": "none"}
    return probing.train(values, tmp_path / "run").path


def test_command_adds_to_results_and_does_nothing_twice(run, monkeypatch):
    command("erase", run, "--dry-run", "--rank", 2)
    assert not (run / "scores").exists()
    line = command("erase", run, "--rank", 2, "--layers", "0,1", "--position", "image").stdout
    assert "results.csv" in line
    table = probing.evaluate(run)
    assert {"cosine", "erased_loss", "erased_excess", "erased_accuracy", "caption_loss"} <= set(table.metric)
    monkeypatch.setattr(erasure, "load_backbone", None)  # nothing is loaded any more
    command("erase", run, "--rank", 2, "--layers", "1", "--position", "image")


def test_interrupted_erasure_resumes_without_fitting_again(run, monkeypatch):
    own = erasure.ErasurePass.__call__
    calls = []

    def stop(self, prepared, scores):
        own(self, prepared, scores)
        calls.append(prepared)
        if len(calls) == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(erasure.ErasurePass, "__call__", stop)
    result = command("erase", run, "--rank", 2, code=130)
    assert "erase" in result.stderr and len(calls) == 1
    monkeypatch.setattr(erasure, "fit_erasers", None)
    command("erase", run, "--rank", 2)
    scores = ScoreFile.read(next((run / "scores").glob("erase-*")))
    assert len(scores.names) == 6 and not (run / "state" / "erase" / "erasers.safetensors").exists()


def test_bad_input_is_one_line(run):
    assert "width" in error_line("erase", run, "--rank", 10_000)
    assert "layer 9" in error_line("erase", run, "--layers", "9")
    (run / "manifest.json").rename(run / "elsewhere.json")
    assert "not finished" in error_line("erase", run)
    (run / "elsewhere.json").rename(run / "manifest.json")


def test_missing_captions_are_one_line(run, recipe_values):
    from pathlib import Path

    file = Path(recipe_values["data"]["path"].removeprefix("coco:")) / "annotations" / "captions_val2017.json"
    text = file.read_text()
    try:
        file.unlink()
        assert "captions" in error_line("erase", run)
        document = json.loads(text)
        file.write_text(json.dumps(document | {"annotations": []}))
        assert "caption" in error_line("erase", run)
    finally:
        file.write_text(text)


def test_checkpoint_without_head_is_one_line(run, monkeypatch):
    def headless(*arguments, **options):
        return load_backbone(*arguments, **options | {"with_head": False})

    monkeypatch.setattr(erasure, "load_backbone", headless)
    with pytest.raises(UserError, match="no language-model head"):
        probing.erase(run, rank=2)
