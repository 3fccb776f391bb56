"""Probes inside checkpoints, imported and evaluated like trained ones."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from analysis.evaluation.run import evaluate
from probing.cli import cli
from probing.distillation.predictors import EmbeddingPredictors, Task
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.hub.import_probes import import_probes
from probing.models import load_backbone
from probing.probes.bank import ProbeBank
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.recipe import BackboneRecipe, TeacherRecipe
from probing.teachers import load_teacher
from probing.utils.errors import UserError
from probing.utils.images import square
from tests.helpers import tiny
from tests.helpers.original import original

CPU = torch.device("cpu")
LAYERS = {"depth": (1, 3), "gen": (2,)}


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    """Trains a stage with embedding losses on two teachers at different layers."""
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


def images_of(folder):
    return [square(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]


def read_table(run):
    return pd.read_csv(run / "results.csv", dtype={"layer": str}, keep_default_na=False)


def is_imported(run):
    return json.loads((run / "manifest.json").read_text())["fit"]["imported"]


def test_imported_predictors_score_as_in_training(checkpoint, models, coco, tmp_path):
    """Compares the scores with those of the trainer's own predictors and token map."""
    run = tmp_path / "run"
    arguments = ["import", str(checkpoint), str(run), "--data", f"coco:{coco}", "backbone.prompt=Which?"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    evaluate(run)
    results = read_table(run)
    scored = results[(results["metric"] == "cosine") & (results["protocol"] == "strict") & (results["layer"] != "mean")]
    probes = scored[scored["probe"] == "resampler"].set_index(["teacher", "layer"])["value"]
    assert set(probes.index) == {(name, str(layer)) for name, layers in LAYERS.items() for layer in layers}

    teachers = {name: load_teacher(name, TeacherRecipe(id=str(models[name])), CPU) for name in LAYERS}
    tasks = [Task(name, LAYERS[name], 0.5, teachers[name].shape) for name in ("gen", "depth")]
    record = json.loads((checkpoint / "training.json").read_text())
    recipe = DistillRecipe.model_validate(yaml.safe_load(record["recipe"]))
    predictors = EmbeddingPredictors(tasks, 32, recipe.embedding)
    predictors.load(checkpoint / "predictors")
    backbone = load_backbone(BackboneRecipe(checkpoint=str(checkpoint), prompt="Which?"), CPU)
    images = images_of(coco / "val2017")
    batch = backbone.prepare(images)
    states = {}
    backbone.stream(batch, [1, 2, 3], lambda layer, hidden: states.update({layer: hidden.float()}))
    assert all((batch.tokens.mask(kind).sum(1) == 4).all() for kind in LAYERS)
    with torch.no_grad():
        for task in tasks:
            target = teachers[task.name].target(teachers[task.name].prepare(images))
            for layer in task.layers:
                prediction = predictors.predict(task, layer, states[layer], batch.tokens)
                expected = torch.cosine_similarity(prediction, target, dim=-1).mean()
                assert probes[task.name, str(layer)] == pytest.approx(float(expected), abs=1e-5)
    targets = teachers["gen"].target(teachers["gen"].prepare(images_of(coco / "train2017")))
    np.testing.assert_allclose(load_file(run / "mean_targets.safetensors")["gen"], targets.mean(0), atol=1e-5)
    assert is_imported(run)
    training = json.loads((run / "manifest.json").read_text())["fit"]
    assert (training["epochs"], training["batch_size"], training["lr"], training["steps"]) == (1, 6, 1e-3, 2)  # of pt


def test_unfit_checkpoint_teacher_or_layer_is_named(checkpoint, models, coco, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has no probes"):
        import_probes(str(models["llava"]), f"coco:{coco}", out)
    other = tiny.depth_teacher(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="were trained on another teacher"):
        import_probes(str(checkpoint), f"coco:{coco}", out, [f"teachers.depth.id={other}"])
    with pytest.raises(UserError, match="no depth probe at layer 0; choose layers from 1, 3"):
        import_probes(str(checkpoint), f"coco:{coco}", out, ["layers=0"])
    assert not out.exists()


@pytest.fixture
def published(tmp_path, models):
    """Writes a checkpoint in the published format: a full model with one depth probe per layer."""
    teacher = load_teacher("depth", TeacherRecipe(id=str(models["depth"])), CPU)
    tokens, width = teacher.shape
    torch.manual_seed(3)
    probes = [Resampler(ResamplerConfig(32, tokens, width, width, 2, 8)) for _ in range(3)]
    heads = {
        f"image_depth_heads.{index}.projector.{name}": tensor
        for index, probe in enumerate(probes)
        for name, tensor in probe.state_dict().items()
    }
    head = {"da_v2_head.depth_head.scratch.output_conv1.weight": torch.zeros(2, 2)}
    folder = tmp_path / "published"
    _, raw, _ = original(folder, "probe_dsg_llava_llama", own_tower=True, headers=True, extra=heads | head)
    sizes = {"depth": 1, "dim_head": 8, "num_heads": 2, "num_tokens": tokens, "output_dim": width, "ff_mult": 1}
    extra = {"probe_mode": "depth", "image_depth": sizes, "num_task_tokens": 8, "depth_estimator": "/cluster/x.pth"}
    (folder / "config.json").write_text(json.dumps(raw | extra))
    return folder, probes, teacher


def test_published_probes_score_at_their_layers(published, models, coco, tmp_path):
    folder, probes, teacher = published
    run = tmp_path / "run"
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with_probes = {file for name, file in shards.items() if "_heads." in name}
    other = folder / min(set(shards.values()) - with_probes)
    content = other.read_bytes()
    other.write_bytes(b"not even a header")  # only the shards with probes are read
    arguments = (str(folder), f"coco:{coco}", run, [f"teachers.depth.id={models['depth']}"])
    import_probes(*arguments)
    other.write_bytes(content)
    shutil.rmtree(run)
    import_probes(*arguments)
    assert [key.layer for key in ProbeBank.load(run / "probes", CPU).probes] == [1, 2, "final"]
    evaluate(run)
    results = read_table(run)
    results = results[(results["metric"] == "cosine") & (results["probe"] == "resampler")]
    scores = results[results["protocol"] == "strict"].set_index("layer")["value"]
    backbone = load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
    images = images_of(coco / "val2017")
    target = teacher.target(teacher.prepare(images))
    states, tokens = backbone.hidden_states(images, "1,2,final")
    assert not tokens.mask("gen", "depth", "seg").any()  # published probes read no special tokens
    for layer, probe in zip(states, probes, strict=True):
        with torch.no_grad():
            expected = torch.cosine_similarity(probe(states[layer]), target, dim=-1).mean()
        assert scores[str(layer)] == pytest.approx(float(expected), abs=1e-5)
    assert scores["mean"] == pytest.approx(scores[["1", "2", "final"]].mean(), abs=1e-6)
    assert is_imported(run)


def test_incomplete_published_probes_are_named(published, models, coco, tmp_path):
    folder, _, _ = published
    config, run = json.loads((folder / "config.json").read_text()), tmp_path / "run"
    depth = f"teachers.depth.id={models['depth']}"

    def refuse(message, override, **values):
        (folder / "config.json").write_text(json.dumps(config | values))
        with pytest.raises(UserError, match=message):
            import_probes(str(folder), f"coco:{coco}", run, [override])

    other = tiny.depth_teacher(tmp_path / "wide", width=24)
    refuse(r"trained on another teacher .* targets \[16, 16\]", f"teachers.depth.id={other}")
    refuse("the probe of layer 4 is incomplete", depth, num_hidden_layers=4)
    refuse("lacks image_depth, the sizes of its probes", depth, image_depth=None)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / index["image_depth_heads.1.projector.latents"]).unlink()
    refuse("lacks the shard", depth)
    assert not run.exists()


def test_predictors_of_original_format_are_refused(tmp_path):
    """Their targets and queries differ from the probes', so that their scores would mean something else."""
    heads = {"image_depth_heads.0.projector.proj_in.weight": torch.zeros(2, 2)}
    original(tmp_path / "pt", "ola_llama", headers=True, special=16, extra=heads)
    with pytest.raises(UserError, match="OLA-VLM's own embedding predictors"):
        import_probes(str(tmp_path / "pt"), "coco:none", tmp_path / "run")
