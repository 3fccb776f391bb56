"""A metric is one file: everything that shows numbers takes its name, label and direction from there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import analysis.evaluation.metrics
from analysis.evaluation import registry
from analysis.evaluation.compare import compare, statements
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from analysis.planning.evaluation import plan_metrics
from probing.recipe import ProbeRunRecipe
from probing.training.run import train
from reports.model_card import write_card
from reports.page import write_report
from tests.helpers import explained


@pytest.fixture
def new_metric(monkeypatch, tmp_path):
    """A file in a folder that `metrics/` extends to."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    shutil.copy(explained.__file__, folder)
    monkeypatch.delitem(sys.modules, "analysis.evaluation.metrics.explained", raising=False)
    monkeypatch.setattr(analysis.evaluation.metrics, "__path__", [*analysis.evaluation.metrics.__path__, str(folder)])
    yield
    registry.REGISTRY.pop("explained", None)


def test_new_metric_is_one_file(new_metric, models, coco, tmp_path):
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"depth": {"id": str(models["depth"])}},
        "layers": "0,2",
        "controls": [],
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0},
    }
    run, options = train(ProbeRunRecipe.model_validate(values), tmp_path / "run"), Options(metrics=("explained",))
    assert "explained" in plan_metrics(run.recipe, options).facts
    results = pd.read_csv(evaluate(run.path, options), keep_default_na=False)
    assert set(results["metric"]) == {"explained"} and set(results["chance"]) == {0}
    assert {"resampler", "ridge"} < set(results["probe"])
    assert results[results["control"] == "mean"]["value"].item() == 0
    differences = compare([run.path, run.path], ["a", "b"])
    assert any(
        sentence.startswith("depth, ridge, explained variance, mean over layers: b - a")
        for sentence in statements(differences)
    )
    page = write_report([run.path], tmp_path / "report").read_text()
    assert "<summary>Explained variance</summary>" in page and "the mean target scores 0" in page
    assert "explained variance ↑" in page
    write_card(run.path, "org/name")
    assert "explained variance" in (run.path / "README.md").read_text()


def test_descriptions_need_no_torch():
    code = "import sys; from analysis.evaluation.registry import infos; print(len(infos()) > 8, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.parametrize(
    ("metric", "protocol", "label", "higher"),
    [
        ("frechet_my_net", "strict", "Fréchet distance (my_net features)", False),
        ("kernel_toy", "strict", "kernel distance (toy features)", False),
        ("miou", "paper", "mIoU per image, early stages shrunk", True),
        ("unknown", "paper", "unknown, paper", True),
    ],
)
def test_metrics_are_described(metric, protocol, label, higher):
    info = registry.describe(metric, protocol)
    assert (info.metric, info.label, info.higher_is_better) == (metric, label, higher)
