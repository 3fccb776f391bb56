"""Training by several processes."""

import time

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from probing.recipe import ProbeRunRecipe
from probing.training.run import train
from tests.helpers import warm

pytestmark = pytest.mark.slow


@pytest.fixture
def start(recipe_values, tmp_path):
    """Starts two processes that train a small run."""
    recipe_values |= {"layers": "0,3", "controls": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))

    def start(name, *overrides):
        arguments = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / name), *overrides]
        return warm.launch(arguments, tmp_path / name)

    return start


def test_two_processes_train_what_one_does(start, recipe_values, tmp_path):
    """Gradients and sums are reduced over the same global batch: equal up to the order of additions; with a buffer."""
    codes, said = warm.finish(start("two", "fit.buffer=1"), tmp_path / "two")
    assert codes == [0, 0], said
    train(ProbeRunRecipe.model_validate(recipe_values), tmp_path / "one")
    for kind in ("probes", "ridge"):
        for teacher in ("depth", "seg", "gen"):
            one, two = (load_file(tmp_path / run / kind / teacher / "model.safetensors") for run in ("one", "two"))
            for name, tensor in one.items():
                assert (tensor - two[name]).abs().max() < 2e-3, (kind, teacher, name)
    one, two = (load_file(tmp_path / run / "prequential" / "errors.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and (one["parts"] >= 0).any()
    for name, errors in one.items():
        assert_close(two[name], errors, rtol=1e-2, atol=0, equal_nan=True, msg=name)


def test_run_resumes_after_the_death_of_a_process(start, tmp_path):
    """The survivor reports it in one line; the same command gives the bytes of an undisturbed run."""
    more = ["fit.epochs=8", "fit.save_minutes=0", "fit.buffer=1"]
    codes, said = warm.finish(start("whole", *more), tmp_path / "whole")
    assert codes == [0, 0], said
    first, second = start("hurt", *more)
    while not list((tmp_path / "hurt" / "state").glob("*/state.pt")):
        assert first.is_alive()
        time.sleep(0.01)
    second.kill()
    codes, said = warm.finish([first, second], tmp_path / "hurt")
    assert codes[0] != 0 and "probing: another process of this run ended" in said
    assert not (tmp_path / "hurt" / "manifest.json").exists()
    codes, said = warm.finish(start("hurt", *more), tmp_path / "hurt")
    assert codes == [0, 0], said
    for file in (
        "probes/depth/model.safetensors",
        "ridge/seg/model.safetensors",
        "prequential/errors.safetensors",
        "learning_curves.csv",
    ):
        assert (tmp_path / "hurt" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
