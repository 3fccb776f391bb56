"""Training by several processes of a launcher."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from probing.recipe import ProbeRunRecipe
from probing.training.run import train

ROOT = Path(__file__).parents[3]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "probing"]

pytestmark = pytest.mark.slow


@pytest.fixture
def start(recipe_values, tmp_path):
    """Starts two processes that train a small run."""
    recipe_values |= {"layers": "0,3", "controls": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")

    def start(name, *overrides):
        arguments = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / name), *overrides]
        return subprocess.Popen([*LAUNCH, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    return start


def test_two_processes_train_what_one_does(start, recipe_values, tmp_path):
    """Gradients and sums are reduced over the same global batch: equal up to the order of additions."""
    two = start("two")
    assert two.wait() == 0, two.stderr.read()
    train(ProbeRunRecipe.model_validate(recipe_values), tmp_path / "one")
    for kind in ("probes", "ridge"):
        for teacher in ("depth", "seg", "gen"):
            one, two = (load_file(tmp_path / run / kind / teacher / "model.safetensors") for run in ("one", "two"))
            for name, tensor in one.items():
                assert (tensor - two[name]).abs().max() < 2e-3, (kind, teacher, name)


def test_run_resumes_after_the_death_of_a_process(start, tmp_path):
    """The survivor reports it in one line; the same command gives the bytes of an undisturbed run."""
    more = ["fit.epochs=12", "fit.save_minutes=0"]
    whole = start("whole", *more)
    assert whole.wait() == 0, whole.stderr.read()
    hurt = start("hurt", *more)
    while not list((tmp_path / "hurt" / "state").glob("*/state.pt")):
        assert hurt.poll() is None
        time.sleep(0.01)
    psutil.Process(hurt.pid).children()[1].kill()
    errors = hurt.communicate(timeout=120)[1]
    assert hurt.returncode != 0 and "probing: another process of this run ended" in errors
    assert not (tmp_path / "hurt" / "manifest.json").exists()
    again = start("hurt", *more)
    assert again.wait() == 0, again.stderr.read()
    for file in ("probes/depth/model.safetensors", "ridge/seg/model.safetensors", "learning_curves.csv"):
        assert (tmp_path / "hurt" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
