"""The public interface: each name in one line, on tiny models."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import probing
from probing.toyworld.cvbench import write_cvbench
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import generate
from probing.utils.errors import UserError
from tests.helpers.encoders import make

INSTANT = (
    "import sys, probing; assert probing.__version__; assert not {'torch', 'pydantic', 'click'} & set(sys.modules)"
)


def test_import_is_instant_and_every_public_name_exists():
    subprocess.run([sys.executable, "-c", INSTANT], check=True, cwd=Path(__file__).parents[2])
    assert all(callable(getattr(probing, name)) for name in probing.__all__)
    assert set(probing.__all__) <= set(dir(probing))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = probing.nothing


def test_models_and_teachers_load_in_one_line(models, tmp_path):
    model = probing.load_model(models["llava"], dtype="float32", prompt="What?")
    assert model.layers == 3 and "What?" in model.prepare.text
    assert probing.load_teacher("depth", id=str(models["depth"])).shape == torch.Size((16, 16))
    encoder = probing.load_teacher(str(make("siglip", tmp_path / "SigLIP v2")), features="pooled")
    assert encoder.name == "siglip-v2" and encoder.shape[0] == 1
    with pytest.raises(UserError, match="unknown field 'dtyp'; did you mean 'dtype'"):
        probing.load_model(models["llava"], dtyp="float32")


@pytest.fixture(scope="module")
def runs(models, coco, tmp_path_factory):
    """Two trained runs that differ by their checkpoint's prompt."""
    root = tmp_path_factory.mktemp("runs")
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"gen": {"id": str(models["gen"])}},
        "controls": [],
    }
    small = {"fit__batch_size": 6, "fit__micro_batch": 6, "fit__workers": 0, "fit__report_to": "none", "layers": "1"}
    one = probing.train(values, root / "one", **small)
    file = root / "one" / "recipe.yaml"
    return one, probing.train(file, str(root / "two"), fit__epochs=1), probing.train(one.recipe, root / "three")


def test_train_takes_values_a_file_or_a_recipe_with_overrides(runs):
    one, two, three = runs
    assert one.recipe.fit.batch_size == 6 and two.recipe.fit.epochs == 1 and three.recipe == one.recipe
    assert probing.load_recipe(probing.ProbeRunRecipe, one.path / "recipe.yaml", ["fit.epochs=5"]).fit.epochs == 5


def test_evaluate_compare_and_report_take_runs(runs):
    one, _, three = runs
    results = probing.evaluate(one, layers="1", protocols=["strict"])
    assert {"checkpoint", "teacher", "layer", "probe", "control", "metric", "value", "n"} <= set(results.columns)
    assert len(results) == len(pd.read_csv(one.path / "results.csv")) > 0
    probing.evaluate(str(three.path), layers="1", protocols=["strict"])
    differences = probing.compare(one, three.path)
    assert (
        (differences["value"] == 0).all()
        and differences["value"].dtype == float
        and {"reference", "ci_low", "seeds"} <= set(differences.columns)
    )
    assert probing.report(one, out=one.path / "page").read_text().startswith("<!doctype html>")
    cosine = results[(results["metric"] == "cosine") & (results["layer"] == "1") & (results["control"] == "none")]
    scores = cosine.set_index("probe")["value"]
    for run in (one, probing.open_run(one.path)):
        for axes, probe in zip(run.plot("cosine").axes, ("resampler", "ridge"), strict=True):
            assert any(line.get_ydata()[0] == pytest.approx(scores[probe]) for line in axes.lines)
    with pytest.raises(UserError, match="no run has the metric miou"):
        probing.plot(one, three, metric="miou")


@pytest.mark.slow
def test_align_and_bench_return_results(tmp_path):
    world = write_world(tmp_path / "world", 2, 6, seed=4)
    words = probing.align(ASSETS / "llava", f"coco:{world}", tmp_path / "words", layers="0", sample=2, workers=0)
    assert "word_retrieval" in set(words["metric"])
    questions = write_cvbench(tmp_path / "questions", generate(2, 3), 3)
    answers = probing.bench(ASSETS / "llava", "cvbench", questions, tmp_path / "answers", max_new_tokens=1)
    assert "accuracy" in set(answers["metric"])
