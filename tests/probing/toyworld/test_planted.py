"""The checkpoint of which we know where the information is."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import probing
from probing.data.coco import read_image
from probing.models.generate import ask
from probing.recipe import BackboneRecipe
from probing.toyworld import planted

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def world(request, tmp_path_factory):
    return planted.write_planted(tmp_path_factory.mktemp("planted"), 240, 60, request.param)


@torch.no_grad()
def states_and_targets(world, split):
    """Returns states of image tokens and mean ones of text by layer, and targets (B, N, D)."""
    model, teacher = probing.load_model(world.checkpoint), probing.load_teacher(str(world.teacher))
    images = [read_image(file) for file in sorted((world.data / split).iterdir())]
    states, tokens = model.hidden_states(images)
    image = {layer: tokens.image_states(state).numpy() for layer, state in states.items()}
    text = {layer: tokens.select(state, ["text"])[0].mean(dim=1).numpy() for layer, state in states.items()}
    return image, text, teacher.target(teacher.prepare(images)).numpy()


def explained(train, held_out):
    """R² of a ridge regression on held-out rows (inputs, outputs)."""
    ridge = Ridge(alpha=1e-3 * len(train[0]) * np.var(train[0], axis=0).mean()).fit(*train)
    return (
        1 - np.square(held_out[1] - ridge.predict(held_out[0])).sum() / np.square(held_out[1] - train[1].mean(0)).sum()
    )


def test_layers_and_positions_are_as_planted(world):
    """Of the image tokens inside the box R² is above .95, and outside below .05; likewise of the text."""
    image, text, target = states_and_targets(world, "train2017")
    held_image, held_text, held_target = states_and_targets(world, "val2017")
    for layer in range(planted.LAYERS + 1):
        train = image[layer].reshape(-1, planted.HIDDEN), target.reshape(-1, target.shape[-1])
        held_out = held_image[layer].reshape(-1, planted.HIDDEN), held_target.reshape(-1, target.shape[-1])
        value = explained(train, held_out)
        assert value > 0.95 if layer in planted.image_layers() else value < 0.05, (layer, value)
        value = explained((text[layer], target.mean(1)), (held_text[layer], held_target.mean(1)))
        assert value > 0.95 if layer in planted.text_layers() else value < 0.05, (layer, value)


def test_checkpoint_answers_from_the_image(world):
    recipe = BackboneRecipe(checkpoint=str(world.checkpoint))
    model = probing.models.load_backbone(recipe, torch.device("cpu"), with_head=True)
    document = json.loads((world.data / "annotations/captions_val2017.json").read_text())
    images = [read_image(world.data / "val2017" / row["file_name"]) for row in document["images"]]
    answers = ask(model, recipe, images, [recipe.prompt] * len(images), most=2)
    right = [answer == row["caption"] for answer, row in zip(answers, document["annotations"], strict=True)]
    assert np.mean(right) > 0.9


def test_ridge_finds_the_box(world, tmp_path):
    """Centred cosine is above .9 inside the box and below .2 outside; code length saves bits inside alone.

    That of the mean feature does so where the mean state of image or text has it, in separate layers.
    """
    fit = {
        "positions": ["image", "text", "last"],
        "epochs": 1,
        "batch_size": 16,
        "micro_batch": 16,
        "workers": 0,
        "report_to": "none",
    }
    recipe = {
        "backbone": {"checkpoint": str(world.checkpoint)}, "data": {"path": f"coco:{world.data}"},
        "teachers": {"products": {"id": str(world.teacher)}}, "layers": "all", "controls": [], "fit": fit,
    }  # fmt: skip
    table = probing.evaluate(probing.train(recipe, tmp_path / "run"), metrics=["cosine", "code_length"])
    ridge = table[(table.probe == "ridge") & (table.layer != "mean")]
    assert set(ridge.metric) == {"cosine_centred", "cosine", "code_length", "code_length_mean"}
    for metric, low, high in (("cosine_centred", 0.2, 0.9), ("code_length", 0, 100), ("code_length_mean", 0, 10)):
        for row in ridge[ridge.metric == metric].itertuples():
            layers = planted.text_layers() if row.variant in ("text", "last") else planted.image_layers()
            inside = int(row.layer) in layers
            assert row.ci_low > high if inside else row.ci_low < low, (metric, row)
