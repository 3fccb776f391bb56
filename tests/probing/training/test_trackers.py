"""Loss curves in TensorBoard and other trackers."""

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from probing.recipe import ProbeRunRecipe, validate
from probing.training import trackers
from probing.training import trainer as fitting
from probing.training.run import train
from probing.training.schedule import learning_rate
from probing.training.trackers import EVERY
from probing.utils.errors import UserError
from probing.utils.interrupt import Interrupted


def logged_curves(folder) -> dict[str, dict[int, float]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


TEACHERS = ("depth", "gen")


def recipe(models, coco, **changes):
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {name: {"id": str(models[name])} for name in TEACHERS},
        "fit": {"epochs": 11, "batch_size": 6, "micro_batch": 3, "workers": 0, **changes},
        "controls": ["shuffled", "random"],
    }
    return validate(ProbeRunRecipe, values, "test")


@pytest.fixture(scope="module")
def logged(models, coco, tmp_path_factory):
    """A run with the default tracker."""
    return train(recipe(models, coco), tmp_path_factory.mktemp("logged") / "run")


def test_logged_curves_are_means_of_learning_curves(logged):
    curves = logged_curves(logged.path / "tensorboard" / "none")
    every = [f"{t}/{c}{g}" for t in TEACHERS for c in ("", "shuffled_") for g in GROUPS]
    assert set(curves) == {*every, "lr", *(f"{t}/mean_target" for t in TEACHERS)}
    table = pd.read_csv(logged.path / "learning_curves.csv")
    steps = table["step"].max() + 1
    for name, control, layers in (
        ("depth/layers_0-1", "none", ["0", "1"]),
        ("gen/shuffled_layer_3", "shuffled", ["3"]),
    ):
        teacher = name.partition("/")[0]
        chosen = table[(table["teacher"] == teacher) & (table["control"] == control)]
        chosen = chosen[chosen["layer"].astype(str).isin(layers)]
        expected = {}
        for first in range(0, steps, EVERY):
            last = min(first + EVERY, steps)
            expected[last] = chosen[chosen["step"].between(first, last - 1)]["loss"].mean()
        assert list(curves[name]) == list(expected)
        np.testing.assert_allclose(list(curves[name].values()), list(expected.values()), rtol=1e-4)
    assert curves["lr"][EVERY] == pytest.approx(learning_rate(EVERY - 1, steps, 1e-3, 0.03), rel=1e-5)
    assert set(logged_curves(logged.path / "tensorboard" / "random")) == {
        *(f"{t}/random_{g}" for t in TEACHERS for g in GROUPS), "lr",
        *(f"{t}/mean_target" for t in TEACHERS),
    }  # fmt: skip


GROUPS = ("layers_0-1", "layer_2", "layer_3")


def test_logging_changes_no_weights_and_none_logs_nothing(logged, models, coco, tmp_path):
    unlogged = train(recipe(models, coco, report_to="none"), tmp_path / "unlogged")
    assert not (unlogged.path / "tensorboard").exists()
    for file in (
        "probes/depth/model.safetensors",
        "controls/random/probes/gen/model.safetensors",
        "learning_curves.csv",
    ):
        assert (logged.path / file).read_bytes() == (unlogged.path / file).read_bytes(), file


def test_interrupted_training_logs_each_step_once(models, coco, tmp_path, monkeypatch):
    values = recipe(models, coco).model_copy(update={"controls": [], "layers": "0"})
    agree, calls = fitting.ProbeTrainer._agree, []

    def stop_at_13(self, *flags):
        calls.append(1)
        return [len(calls) == 13, False] if len(calls) <= 13 else agree(self, *flags)

    monkeypatch.setattr(fitting.ProbeTrainer, "_agree", stop_at_13)
    with pytest.raises(Interrupted):
        train(values, tmp_path / "run")
    run = train(values, tmp_path / "run")
    curves = logged_curves(run.path / "tensorboard" / "none")
    assert list(curves["lr"]) == [10, 20, 22]


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "choose none, aim"), ("aim", "is not installed")])
def test_unknown_tracker_is_refused_before_writing(models, coco, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        train(recipe(models, coco, report_to=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tracker_that_fails_to_start_is_a_user_error(models, coco, tmp_path, monkeypatch):
    class NotLoggedIn:
        requires_logging_directory = False

        def __init__(self, name):
            raise RuntimeError("no API key\nTraceback of the library")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", NotLoggedIn)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    with pytest.raises(UserError, match=r"wandb does not start: no API key; .* fit.report_to=none"):
        train(recipe(models, coco, report_to="wandb"), tmp_path / "run")
