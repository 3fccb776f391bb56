"""What runs on a GPU gives what a CPU gives. PROBING_REHEARSE=1 runs these tests on the CPU."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import probing
from analysis.evaluation import run as evaluation
from probing.models import load_backbone
from probing.recipe import BackboneRecipe, ProbeRunRecipe
from probing.training.run import training_images
from probing.utils.images import square
from tests.helpers.trainer import make_trainer

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def device():
    """The accelerator."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    if not os.environ.get("PROBING_REHEARSE"):
        pytest.skip("no accelerator")
    return CPU


def train(values, device, folder, **fit):
    """Trains probes and the ridge readout on a device."""
    trainer = make_trainer(values, folder, [0, 2, "final"], ["none", "shuffled"], device, **fit)
    return trainer.run(), trainer


@pytest.mark.parametrize("buffer", ["off", 1])
def test_probes_learn_what_they_learn_on_the_cpu(device, recipe_values, tmp_path, buffer):
    there, trainer = train(recipe_values, device, tmp_path / "there", buffer=buffer)
    here, _ = train(recipe_values, CPU, tmp_path / "here")
    np.testing.assert_allclose(there.losses, here.losses, rtol=2e-3)
    states = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for key, (weight, bias) in trainer.readout(there).maps.items():
        expected_weight, expected_bias = trainer.readout(here).maps[key]
        expected = states @ expected_weight.T + expected_bias
        found = states @ weight.cpu().T + bias.cpu()
        assert (found - expected).abs().max() < 1e-2 * expected.std()


def test_scores_are_those_of_the_cpu(device, recipe_values, tmp_path, monkeypatch):
    run = probing.train(recipe_values, tmp_path / "run").path
    found = []
    for place in (device, CPU):
        monkeypatch.setattr(evaluation, "require_single_process", lambda _, on=place: SimpleNamespace(device=on))
        shutil.rmtree(run / "scores", ignore_errors=True)
        found.append(probing.evaluate(run, metrics=("cosine",)))
    there, here = found
    assert len(there) > 50 and list(there.columns) == list(here.columns)
    np.testing.assert_allclose(there["value"], here["value"], atol=2e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_states_are_close_to_float32(device, recipe_values, attention):
    images = training_images(ProbeRunRecipe.model_validate(recipe_values).data)
    pictures = [square(images.read(index)) for index in range(4)]
    found = []
    for at, dtype in ((device, "bfloat16"), (CPU, "float32")):
        checkpoint = recipe_values["backbone"]["checkpoint"]
        recipe = BackboneRecipe(checkpoint=checkpoint, dtype=dtype, attn_implementation=attention)
        states, _ = load_backbone(recipe, at).hidden_states(pictures, "2,final")
        found.append({layer: state.float().cpu() for layer, state in states.items()})
    for layer, exact in found[1].items():
        assert (found[0][layer] - exact).norm() / exact.norm() < 0.03, layer
