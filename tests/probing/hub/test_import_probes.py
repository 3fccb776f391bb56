"""A checkpoint's own embedding predictors, evaluated as probes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from analysis.evaluation.run import evaluate
from probing.distillation.predictors import EmbeddingPredictors, Task
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.hub.import_probes import find_probes, import_probes, import_recipe
from probing.models import load_backbone
from probing.probes.bank import ProbeBank
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.recipe import BackboneRecipe, TeacherRecipe
from probing.teachers import load_teacher
from probing.utils.errors import UserError
from probing.utils.images import square
from reports.page import write_report
from tests.helpers import tiny
from tests.helpers.original import original

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
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == code, done.stderr
    return done


def bring(checkpoint, run, coco, *overrides):
    """What `probing import` does."""
    found = find_probes(str(checkpoint))
    return import_probes(import_recipe(str(checkpoint), f"coco:{coco}", found, overrides), found, run)


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
    write_report([run], run / "report")
    assert "trained elsewhere, and imported" in (run / "report" / "index.html").read_text()


def test_what_cannot_be_imported(checkpoint, models, coco, tmp_path):
    none = tmp_path / "none"
    done = probing("import", models["llava"], none, "--data", f"coco:{coco}", code=2)
    assert "has neither embedding predictors" in done.stderr
    other = tiny.depth_teacher(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="were trained towards another teacher"):
        bring(checkpoint, none, coco, f"teachers.depth.id={other}")
    with pytest.raises(UserError, match="probes have no layer 0; there are "):
        bring(checkpoint, none, coco, "layers=0")
    assert not none.exists()


@pytest.fixture
def published(tmp_path, models):
    """A checkpoint of depth probes as published: a full model, and in it one probe for each of its three layers."""
    teacher = load_teacher("depth", TeacherRecipe(id=str(models["depth"])), CPU)
    tokens, width = teacher.shape
    torch.manual_seed(3)
    probes = [Resampler(ResamplerConfig(32, tokens, width, width, 2, 8)) for _ in range(3)]
    heads = {
        f"image_depth_heads.{index}.projector.{name}": tensor
        for index, probe in enumerate(probes)
        for name, tensor in probe.state_dict().items()
    }
    teachers_own = {"da_v2_head.depth_head.scratch.output_conv1.weight": torch.zeros(2, 2)}
    folder = tmp_path / "published"
    _, raw, _ = original(folder, "probe_dsg_llava_llama", own_tower=True, headers=True, extra=heads | teachers_own)
    sizes = {"depth": 1, "dim_head": 8, "num_heads": 2, "num_tokens": tokens, "output_dim": width, "ff_mult": 1}
    said = {"probe_mode": "depth", "image_depth": sizes, "num_task_tokens": 8, "depth_estimator": "/cluster/x.pth"}
    (folder / "config.json").write_text(json.dumps(raw | said))
    return folder, probes, teacher


def test_published_probes_are_read_alone_and_scored_where_they_were_trained(published, models, coco, tmp_path):
    folder, probes, teacher = published
    run = tmp_path / "run"
    depth = f"teachers.depth.id={models['depth']}"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    without = next(
        file for file in set(index.values()) if not any("_heads." in n for n, f in index.items() if f == file)
    )
    whole = (folder / without).read_bytes()
    (folder / without).write_bytes(b"not even a header")
    bring(folder, run, coco, depth)
    (folder / without).write_bytes(whole)
    shutil.rmtree(run)
    bring(folder, run, coco, depth)
    bank = ProbeBank.load(run / "probes", CPU)
    assert [key.layer for key in bank.probes] == [1, 2, "final"]
    evaluate(run)
    results = pd.read_csv(run / "results.csv", dtype={"layer": str}, keep_default_na=False)
    backbone = load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
    images = [square(Image.open(path).convert("RGB")) for path in sorted((coco / "val2017").iterdir())]
    target = teacher.target(teacher.prepare(images))
    states, tokens = backbone.hidden_states(images, "1,2,final")
    assert not tokens.mask("gen", "depth", "seg").any()  # a saved probe never sees them
    for layer, probe in zip(states, probes, strict=True):
        with torch.no_grad():
            own = torch.cosine_similarity(probe(states[layer]), target, dim=-1).mean()
        row = results[
            (results["layer"] == str(layer)) & (results["metric"] == "cosine") & (results["probe"] == "resampler")
        ]
        assert row[row["protocol"] == "strict"]["value"].item() == pytest.approx(float(own), abs=1e-5)
    scored = results[
        (results["metric"] == "cosine") & (results["probe"] == "resampler") & (results["control"] == "none")
    ]
    layers = scored[(scored["protocol"] == "strict") & (scored["seed"].astype(str) == "0")].set_index("layer")["value"]
    assert layers["mean"] == pytest.approx(layers[["1", "2", "final"]].mean(), abs=1e-6)  # as many as the LLM has
    write_report([run], run / "report")
    assert "elsewhere; imported" in (run / "report" / "index.html").read_text()


def test_incomplete_published_probes_are_named(published, models, coco, tmp_path):
    folder, _, _ = published
    config, run = json.loads((folder / "config.json").read_text()), tmp_path / "run"
    depth = f"teachers.depth.id={models['depth']}"

    def refused(message, *overrides, **values):
        (folder / "config.json").write_text(json.dumps(config | values))
        with pytest.raises(UserError, match=message):
            bring(folder, run, coco, *overrides)

    other = tiny.depth_teacher(tmp_path / "wide", width=24)
    refused(r"were trained towards another teacher, with targets of \[16, 16\]", f"teachers.depth.id={other}")
    refused("the probe of layer 4 is incomplete", depth, num_hidden_layers=4)
    refused("not the sizes of its probes", depth, image_depth=None)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / index["image_depth_heads.1.projector.latents"]).unlink()
    refused("lacks the shard", depth)
    assert not run.exists()


def test_predictors_of_the_original_format_are_refused(tmp_path):
    """They have other targets and queries than probes, so that their scores would mean something else."""
    heads = {"image_depth_heads.0.projector.proj_in.weight": torch.zeros(2, 2)}
    original(tmp_path / "pt", "ola_llama", headers=True, special=16, extra=heads)
    with pytest.raises(UserError, match="OLA-VLM's own format are not imported"):
        find_probes(str(tmp_path / "pt"))
