"""Where a feature is, and whether it is used: verdicts on the planted checkpoint, of which both are known."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import probing
from analysis.evaluation.scores import COLUMNS
from probing.toyworld import planted
from reports.results import load_runs
from reports.use import LOSS, NO_EVIDENCE, USED, used, where
from tests.helpers.report_runs import make_run


def test_verdicts_on_the_planted_checkpoint(tmp_path):
    world = planted.write_planted(tmp_path, 240, 60, 3)
    fit = {"epochs": 1, "batch_size": 16, "micro_batch": 16, "workers": 0, "report_to": "none"}
    recipe = {
        "backbone": {"checkpoint": str(world.checkpoint)}, "data": {"path": f"coco:{world.data}"},
        "teachers": {"products": {"id": str(world.teacher)}}, "layers": "all", "controls": [],
        "fit": fit | {"positions": ["image", "text"]},
    }  # fmt: skip
    run = probing.train(recipe, tmp_path / "run")
    probing.evaluate(run, metrics=["cosine", "code_length"])
    probing.erase(run)
    (results,) = load_runs([run.path])
    found = re.fullmatch(r"image tokens \d+ \(layer (\d)\), text \d+ \(layer (\d)\)", where(results, "products"))
    image, text = found.groups()
    assert int(image) in planted.image_layers() and int(text) in planted.text_layers()
    place, layer = re.search(r"yes: (.*), layer (\d), ", used(results, "products")).groups()
    assert int(layer) in {
        "image tokens": range(planted.COMPUTED, planted.MOVED), "text": planted.text_layers()
    }[place]  # fmt: skip
    page = probing.report(run, out=tmp_path / "page").read_text()
    assert "Does the model use it" in page and used(results, "products") in page


@pytest.mark.parametrize(("layers", "low"), [(2, 0.001), (40, 0.001), (2, -0.001)])
def test_use_is_sure_over_all_layers_together(tmp_path, layers, low):
    """An interval that barely excludes 0 is no evidence among many, and 5 % of runs without use are called used."""
    (loaded,) = load_runs([make_run(tmp_path / "run", layers=2)])
    columns = dict.fromkeys(COLUMNS, "")
    generator = np.random.default_rng(0)
    called = 0
    for trial in range(200):
        noise = generator.normal(0, 1, layers)
        rows = [
            columns | {
                "teacher": "depth", "layer": str(k), "probe": "leace", "control": "none", "metric": USED,
                "protocol": "strict", "variant": "image", "split": "val2017", "seed": "0", "n": 50,
                "value": value, "ci_low": value - 1.96, "ci_high": value + 1.96,
            }
            for k, value in enumerate(noise if trial else [1.96 + low, *[-5.0] * (layers - 1)])
        ]  # fmt: skip
        table = pd.DataFrame(rows).astype({name: float for name in ("value", "ci_low", "ci_high")})
        answer = used(replace(loaded, results=table), "depth")
        if trial:
            called += answer != NO_EVIDENCE
        else:
            assert answer == NO_EVIDENCE
    assert called <= 20


@pytest.mark.parametrize(("low", "answer"), [(0.05, "yes: image tokens, layer 1, "), (-0.2, NO_EVIDENCE)])
def test_nothing_is_used_whose_erasure_does_not_raise_the_loss(tmp_path, low, answer):
    """Erasing a random subspace can lower the loss, so that the excess is high where nothing is lost."""
    (loaded,) = load_runs([make_run(tmp_path / "run", layers=2)])
    rows = [
        dict.fromkeys(COLUMNS, "") | {
            "teacher": "depth", "layer": str(layer), "probe": "leace", "control": "none", "metric": metric,
            "protocol": "strict", "variant": "image", "split": "val2017", "seed": "0", "n": 50,
            "value": start + 0.1, "ci_low": start, "ci_high": start + 0.2,
        }
        for metric, starts in ((USED, (-0.1, 0.3)), (LOSS, (0.5, low))) for layer, start in enumerate(starts)
    ]  # fmt: skip
    table = pd.DataFrame(rows).astype({name: float for name in ("value", "ci_low", "ci_high")})
    assert used(replace(loaded, results=table), "depth").startswith(answer)
