"""The truth about scenes, read from the layers of a toy checkpoint."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.linear_model import Ridge

from probing.models import load_backbone
from probing.recipe import BackboneRecipe
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import generate

SCRIPT = Path(__file__).parents[2] / "examples" / "toy" / "ground_truth.py"


def test_explained_variance_is_that_of_scikit_learns_ridge():
    ground_truth = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    recipe = BackboneRecipe(checkpoint=str(ASSETS / "llava"), dtype="float32")
    backbone, train, held_out = load_backbone(recipe, torch.device("cpu")), generate(100, 1), generate(60, 2)
    rows = {(row["truth"], row["layer"]): row for row in ground_truth.explained(backbone, train, held_out)}
    assert len(rows) == 3 * 9 and all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in rows.values())
    states = [
        next(s for _, layer, s in ground_truth.image_states(backbone, part) if layer == 4) for part in (train, held_out)
    ]
    for name, known in ground_truth.truth(train).items():
        x, new = (one.mean(dim=1, keepdim=True) if name == "count" else one for one in states)
        x, new = (one.double().flatten(0, 1).numpy() for one in (x, new))
        wanted = ground_truth.truth(held_out)[name]
        penalty = ground_truth.PENALTY * x.var(axis=0).mean() * len(x)
        prediction = Ridge(penalty).fit(x, known.double().flatten(0, 1).numpy()).predict(new)
        error = (torch.from_numpy(prediction).view(wanted.shape) - wanted).square().sum()
        expected = 1 - float(error / (wanted - known.mean(dim=0)).square().sum())
        assert rows[name, 4]["value"] == pytest.approx(expected, rel=1e-4)
