"""A checkpoint's own embedding predictors, evaluated as probes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from probing.backbones import load_backbone
from probing.data.coco import square
from probing.distill.predictors import EmbeddingPredictors, Task
from probing.distill.recipe import DistillRecipe
from probing.distill.train import run_stage
from probing.recipe import BackboneRecipe, TeacherRecipe
from probing.teachers import load_teacher
from tests import tiny

CPU = torch.device("cpu")
LAYERS = {"depth": (1, 3), "gen": (2,)}


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    """A stage with embedding losses towards two teachers, at layers of their own."""
    root = tmp_path_factory.mktemp("import")
    data = tiny.conversations(root / "data", 12)
    values = {
        "checkpoint": str(models["llava"]), "stage": "pt", "batch_size": 6, "micro_batch": 3, "workers": 0,
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        "embedding": {
            "teachers": {name: {"id": str(models[name])} for name in LAYERS},
            "layers": {name: ",".join(map(str, layers)) for name, layers in LAYERS.items()},
            "seek": 4, "heads": 2, "dim_head": 8,
        },
        "trainer": {"report_to": "none", "use_cpu": True},
    }  # fmt: skip
    return run_stage(DistillRecipe.model_validate(values), root / "pt")


def probing(*arguments, code=0):
    command = [sys.executable, "-m", "probing", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == code, done.stderr
    return done


def test_predictors_are_scored_as_what_they_are(checkpoint, models, coco, tmp_path):
    """From the command line to the table; the scores against the trainer's own predictors and token map."""
    run = tmp_path / "run"
    probing("import", checkpoint, run, "--data", f"coco:{coco}", "backbone.prompt=Which?")
    probing("evaluate", run)
    results = pd.read_csv(run / "results.csv", dtype={"layer": str}, keep_default_na=False)
    scored = results[(results["metric"] == "cosine") & (results["protocol"] == "strict") & (results["layer"] != "mean")]
    probes = scored[scored["probe"] == "resampler"]
    there = {(row.teacher, int(row.layer)) for row in probes.itertuples()}
    assert there == {(name, layer) for name, layers in LAYERS.items() for layer in layers}

    teachers = {name: load_teacher(name, TeacherRecipe(id=str(models[name])), CPU) for name in LAYERS}
    tasks = [Task(name, LAYERS[name], 0.5, teachers[name].shape) for name in ("gen", "depth")]
    predictors = EmbeddingPredictors(tasks, 32, 4, ["system", "image", "special", "text"], 2, 8)
    predictors.load(checkpoint / "predictors")
    backbone = load_backbone(BackboneRecipe(checkpoint=str(checkpoint), prompt="Which?"), CPU)
    images = [square(Image.open(path).convert("RGB")) for path in sorted((coco / "val2017").iterdir())]
    batch = backbone.prepare(images)
    states = {}
    backbone.stream(batch, [1, 2, 3], lambda layer, hidden: states.update({layer: hidden.float()}))
    assert all((batch.tokens.mask(kind).sum(1) == 4).all() for kind in LAYERS)
    with torch.no_grad():
        for task in tasks:
            target = teachers[task.name].target(teachers[task.name].prepare(images))
            for layer in task.layers:
                prediction = predictors.predict(task, layer, states[layer], batch.tokens.kinds)
                own = torch.cosine_similarity(prediction, target, dim=-1).mean()
                row = probes[(probes["teacher"] == task.name) & (probes["layer"] == str(layer))].iloc[0]
                assert row["value"] == pytest.approx(float(own), abs=1e-5)
    mean = load_file(run / "mean_targets.safetensors")["gen"]
    training = [square(Image.open(path).convert("RGB")) for path in sorted((coco / "train2017").iterdir())]
    targets = teachers["gen"].target(teachers["gen"].prepare(training))
    np.testing.assert_allclose(mean, targets.mean(0), atol=1e-5)
    probing("report", run)
    assert "trained elsewhere, and imported" in (run / "report" / "index.html").read_text()
    assert "there already" in probing("evaluate", run).stderr


def test_what_cannot_be_imported(checkpoint, models, coco, tmp_path):
    where = ("--data", f"coco:{coco}")
    done = probing("import", models["llava"], tmp_path / "none", *where, code=2)
    assert "has no embedding predictors" in done.stderr and not (tmp_path / "none").exists()
    other = tiny.depth_teacher(tmp_path / "other", seed=9)
    done = probing("import", checkpoint, tmp_path / "none", *where, f"teachers.depth.id={other}", code=2)
    assert "were trained towards another depth teacher" in done.stderr and not (tmp_path / "none").exists()
    done = probing("import", checkpoint, tmp_path / "none", *where, "layers=0", code=2)
    assert "has no layer 0; it has " in done.stderr and not (tmp_path / "none").exists()
