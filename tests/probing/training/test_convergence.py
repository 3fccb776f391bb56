import json

import numpy as np
import pytest

from probing.recipe import ProbeRunRecipe
from probing.training.convergence import judge
from probing.training.run import train
from tests.helpers import tiny

RNG = np.random.default_rng(0)
DIFFICULTY = 1 + 0.05 * RNG.standard_normal(500)  # how hard each batch happens to be


@pytest.mark.parametrize(
    ("curve", "state"),
    [
        (0.3 + 0.5 * np.exp(-np.arange(500) / 40), "flat"),
        (1.0 - np.arange(500) / 1000, "still falling"),
        (np.full(500, 1.0), "stuck at the mean"),
        (np.full(500, 0.5), "flat"),
    ],
)
def test_curves_get_the_expected_state(curve, state):
    noise = 1 + 0.01 * RNG.standard_normal(500)
    assert judge(curve * DIFFICULTY * noise, DIFFICULTY).state == state


def test_batch_difficulty_is_no_progress():
    easier = np.linspace(1.2, 0.8, 500)
    assert judge(0.5 * easier, easier).state == "flat"


def test_few_steps_give_no_slope():
    assert judge(np.array([0.1]), np.array([1.0])).state == "still falling"


NOTHING = float("nan")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("losses", "means", "state"),
    [
        ([0.4, 0.0, 0.4], [1.0, 1.0, 1.0], "flat"),  # one image of a pair could not be read: no shuffled pair
        ([0.4, 0.4, 0.0], [1.0, 1.0, 1.0], "flat"),
        ([0.4, 0.4, NOTHING], [1.0, 1.0, NOTHING], "flat"),  # no image of the step could be read
        ([0.4, np.inf], [1.0, 1.0], "still falling"),
        ([0.0], [1.0], "not trained"),
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], "not trained"),
        ([NOTHING] * 30, [NOTHING] * 30, "not trained"),
        ([], [], "not trained"),
        ([0.4], [0.0], "still falling"),  # the mean of a single image is the image
        ([0.4, 0.4], [0.0, 0.0], "stuck at the mean"),
        ([0.4, 0.4], [0.0, 1.0], "flat"),
    ],
)
def test_steps_without_loss_are_excluded(losses, means, state):
    verdict = judge(np.array(losses, dtype=float), np.array(means, dtype=float))
    assert verdict.state == state
    assert np.isnan(verdict.last_loss) == (state == "not trained")


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_tiny_run_with_unreadable_images_finishes(recipe_values, tmp_path, broken):
    """Batches of two: a step has one image, or none."""
    data = tiny.coco(tmp_path / "coco", train=4, val=2)
    for file in sorted((data / "train2017").iterdir())[:broken]:
        file.write_bytes(b"broken")
    recipe_values |= {"data": {"path": f"coco:{data}"}, "layers": "0"}
    recipe_values["teachers"] = {"gen": recipe_values["teachers"]["gen"]}
    recipe_values["fit"] |= {"epochs": 1, "batch_size": 2, "micro_batch": 2}
    run = train(ProbeRunRecipe.model_validate(recipe_values), tmp_path / "run")
    rows = json.loads((run.path / "manifest.json").read_text())["convergence"]
    assert {row["control"] for row in rows} == {"none", "shuffled"}
