"""--dry-run: what is said is what is then done, bad input is refused, and nothing is written."""

import json

import pytest
import yaml
from click.testing import CliRunner

from analysis.planning.dry_run import rehearse_training
from probing.cli import cli
from probing.recipe import ProbeRunRecipe, dump_recipe
from probing.training.run import train
from probing.utils.errors import UserError
from probing.utils.interrupt import Interrupted, Interruption
from tests.helpers import tiny


def said(*arguments):
    done = CliRunner().invoke(cli, [*map(str, arguments), "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_training_and_scoring(recipe_values, tmp_path, monkeypatch):
    recipe_values["teachers"].pop("seg")
    recipe = ProbeRunRecipe.model_validate(recipe_values | {"controls": ["shuffled", "random"]})
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(recipe))
    text = said("train", "--recipe", file, "--out", out)
    assert f"run: {out} (new)" in text and "layers 0, 1, 2, 3\n" in text
    assert "12 of train2017 to train on, 6 of val2017" in text and "steps: 4 of 6 images" in text
    assert "disk: " in text and not out.exists()

    class Stop(Interruption):  # after one step
        def __init__(self):
            super().__init__()
            self.asked = True

    with monkeypatch.context() as stopped:
        stopped.setattr("probing.training.trainer.Interruption", Stop)
        with pytest.raises(Interrupted):
            train(recipe, out)
    before = contents(out)
    text = said("train", "--recipe", file, "--out", out)
    assert "the checkpoint: goes on after step 1 of 4, random weights: from the start" in text
    assert contents(out) == before
    with pytest.raises(UserError, match=r"holds another run \(fit.lr is 0.001 there and 0.5 here\)"):
        said("train", "--recipe", file, "--out", out, "fit.lr=0.5")
    with pytest.raises(UserError, match="has not finished"):
        said("evaluate", out)

    train(recipe, out)
    before = contents(out)
    assert "finished already; nothing would be done" in said("train", "--recipe", file, "--out", out)
    text = said("evaluate", out)
    assert "cosine: 6 images x 2 forward passes" in text and f"writes: {out / 'results.csv'}" in text
    with pytest.raises(UserError, match="give --da2k DIR"):
        said("evaluate", out, "--metric", "da2k")
    assert contents(out) == before


def test_what_would_not_fit_is_refused(recipe_values, tmp_path, monkeypatch):
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="no disk space"):
        rehearse_training(recipe, tmp_path / "run")
    recipe.layers = "0,9"
    with pytest.raises(UserError, match="layer 9 is out of range"):
        rehearse_training(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_stage(models, tmp_path):
    data = tiny.conversations(tmp_path / "data", 12)
    values = {
        "checkpoint": str(models["llava"]), "stage": "pt", "batch_size": 6, "micro_batch": 3, "workers": 0,
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        "trainer": {"report_to": "none", "use_cpu": True},
    }  # fmt: skip
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values))
    out, before = tmp_path / "out", contents(tmp_path)
    text = said("distill", tmp_path / "stage.yaml", "--out", out)
    assert f"checkpoint: {out} (new)" in text and "12 conversations" in text and "steps: 2 of 6" in text
    assert contents(tmp_path) == before
    CliRunner().invoke(cli, ["distill", str(tmp_path / "stage.yaml"), "--out", str(out)], catch_exceptions=False)
    assert json.loads((out / "training.json").read_text())["steps"] == 2
    assert "finished already" in said("distill", tmp_path / "stage.yaml", "--out", out)
    with pytest.raises(UserError, match="holds another recipe"):
        said("distill", tmp_path / "stage.yaml", "--out", out, "seed=3")
