"""Embedding losses towards a plain encoder, and the predictors as probes."""

import json

import pandas as pd
import pytest

from analysis.evaluation.run import evaluate
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.hub.import_probes import import_probes
from probing.recipe import validate
from probing.utils.errors import UserError
from tests.helpers import encoders, tiny


@pytest.mark.slow
def test_plain_encoder_is_a_task_without_special_tokens(models, coco, tmp_path):
    root = tiny.conversations(tmp_path / "data", 12)
    teacher = {"id": str(encoders.make("siglip", tmp_path / "siglip")), "features": "pooled"}
    values = {
        "checkpoint": str(models["llava"]),
        "stage": "pt",
        "data": {"conversations": str(root / "data.json"), "image_root": str(root)},
        "embedding": {
            "teachers": {"siglip": teacher, "depth": {"id": str(models["depth"])}},
            "layers": {"siglip": "1,2", "depth": "2"},
            "keys": ["image", "special"],
        },
        **{"batch_size": 6, "micro_batch": 3, "epochs": 4, "workers": 0, "lr": 1e-2},
        "trainer": {"report_to": "none", "use_cpu": True, "logging_steps": 1},
    }
    with pytest.raises(UserError, match="not siglip; set seek=0"):
        validate(DistillRecipe, values, "test")
    values["embedding"]["seek"] = 0
    folder = run_stage(validate(DistillRecipe, values, "test"), tmp_path / "pt")
    log = json.loads((folder / "training.json").read_text())["log"]
    losses = [row["loss/siglip.2.smooth_l1"] for row in log if "loss/siglip.2.smooth_l1" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    run = import_probes(str(folder), f"coco:{coco}", tmp_path / "run")
    assert {name: teacher.features for name, teacher in run.recipe.teachers.items()} == {
        "siglip": "pooled",
        "depth": "patches",
    }
    results = pd.read_csv(evaluate(run.path), dtype={"layer": str}, keep_default_na=False)
    own = results[results["teacher"] == "siglip"]
    assert {"1", "2"} <= set(own["layer"]) and set(results["teacher"]) == {"siglip", "depth"}
