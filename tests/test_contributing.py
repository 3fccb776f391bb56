"""The examples of CONTRIBUTING.md: each is one new file in its package."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import FastVlmForConditionalGeneration

import analysis.evaluation.metrics
from analysis.evaluation.registry import REGISTRY
from probing.data.coco import list_images
from probing.models import load_backbone
from probing.probes.ridge import RidgeReadout, resize_states
from probing.recipe import TeacherRecipe
from probing.runs.directory import Run
from probing.teachers import load_teacher
from probing.utils.images import square
from tests.helpers import cli, explained
from tests.helpers.new_parts import add_family, add_teacher, fast_vlm, segformer


@pytest.fixture
def run_cli():
    return lambda *arguments: cli.probing(*arguments).output


def place(monkeypatch, package, folder, name, text):
    """Adds a file in another folder to a package."""
    assert len(text.splitlines()) < 60
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()


@pytest.mark.slow
def test_teacher_family_and_metric_are_one_file_each(monkeypatch, coco, tmp_path, run_cli):
    monkeypatch.setitem(REGISTRY, "explained", None)
    monkeypatch.delitem(REGISTRY, "explained")
    monkeypatch.delitem(sys.modules, "analysis.evaluation.metrics.explained", raising=False)
    place(monkeypatch, analysis.evaluation.metrics, tmp_path, "explained", Path(explained.__file__).read_text())
    add_teacher(monkeypatch, tmp_path / "teachers")
    add_family(monkeypatch, tmp_path / "families")
    assert "logits on the grid" in run_cli("teachers")
    checkpoint, folder = fast_vlm(tmp_path / "fastvlm"), segformer(tmp_path / "segformer")
    assert "fastvit_mci3" in run_cli("inspect", checkpoint)
    run_cli(
        "train", "--checkpoint", checkpoint, "--data", f"coco:{coco}", "--teacher", f"semantic={folder}",
        "--layers", "0,2", "--out", tmp_path / "run", "fit.epochs=1", "fit.batch_size=6", "fit.micro_batch=3",
        "fit.workers=0",
    )  # fmt: skip
    run_cli("evaluate", tmp_path / "run", "--metric", "cosine", "--metric", "explained")
    run_cli("report", tmp_path / "run")
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "semantic" in page and "explained" in page
    results = pd.read_csv(tmp_path / "run" / "results.csv", keep_default_na=False)
    own = results[(results["metric"] == "explained") & (results["layer"].isin(["0", "2"]))]
    assert set(own["probe"]) == {"resampler", "ridge"} and (own["value"] < 1).all()
    assert results[(results["metric"] == "explained") & (results["control"] == "mean")]["value"].item() == 0
    _ridge_by_hand(Run.open(tmp_path / "run"), folder, coco, own)


def _ridge_by_hand(run, folder, coco, own):
    """The share explained at layer 2, from the saved readout and the model's own states, image by image."""
    cpu = torch.device("cpu")
    teacher = load_teacher("semantic", TeacherRecipe(id=str(folder)), cpu)
    backbone = load_backbone(run.recipe.backbone, cpu)
    model = FastVlmForConditionalGeneration.from_pretrained(run.recipe.backbone.checkpoint).eval()
    assert backbone.family == "fast_vlm"
    weight, bias = RidgeReadout.load(run.ridge("none"), cpu).maps["semantic", 2]
    mean = run.mean_targets(cpu)["semantic"]
    images, shares = list_images(coco, "val2017", None), []
    for index in range(len(images)):
        picture = square(images.read(index))
        target = teacher.target(teacher.prepare([picture]))[0]
        states, tokens = backbone.hidden_states([picture], "2")
        with torch.no_grad():
            whole = model(**backbone.prepare([picture]).inputs, output_hidden_states=True)
        torch.testing.assert_close(states[2], whole.hidden_states[2], atol=1e-5, rtol=1e-4)
        placed = resize_states(tokens.image_states(states[2]), tokens.grid, teacher.grid)[0]
        errors = [
            (((weight @ state + bias) - t).square().sum(), (m - t).square().sum())
            for state, t, m in zip(placed, target, mean, strict=True)
        ]
        shares.append(1 - float(sum(e for e, _ in errors) / sum(w for _, w in errors)))
    found = own[(own["probe"] == "ridge") & (own["layer"] == "2") & (own["control"] == "none")]["value"].item()
    assert found == pytest.approx(np.mean(shares), abs=1e-3)
