"""Images whose hidden states or targets are not finite, and steps whose gradients are not."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from probing.data.coco import list_images
from probing.models import load_backbone
from probing.models.base import Backbone, layer_ranges
from probing.models.finite import finite_rows, not_finite_rows, report_not_finite
from probing.probes.bank import ProbeBank, ProbeKey
from probing.probes.resampler import ResamplerConfig
from probing.recipe import BackboneRecipe, ProbeRunRecipe
from probing.teachers import load_teachers
from probing.training.convergence import NOT_TRAINED, judge
from probing.training.run import load_run_backbone, train
from probing.training.schedule import plan_steps
from probing.training.trainer import ProbeTrainer
from probing.utils import pretrained
from probing.utils.images import square
from tests.helpers import tiny
from tests.helpers.poison import poison_states, poison_targets
from tests.helpers.trainer import make_trainer

CPU = torch.device("cpu")
BAD = 4
"""Index of the image that is not finite."""


@pytest.fixture
def train_probes(recipe_values, tmp_path):
    """Trains probes, perhaps without some images; returns final state and trainer."""

    def run(name, without=(), layers=(1, 2), controls=("none",), teachers=("gen",), prepare=None, **changes):
        fields = {"epochs": 1, "batch_size": 12, "micro_batch": 5} | changes
        values = recipe_values | {"teachers": {teacher: recipe_values["teachers"][teacher] for teacher in teachers}}
        trainer = make_trainer(values, tmp_path / name, layers, controls, **fields)
        names = trainer.images.names
        trainer.images.names = [image for index, image in enumerate(names) if index not in without]
        if prepare:
            prepare(trainer)
        return trainer.run(), trainer

    return run


@pytest.fixture
def images(coco):
    """The training images."""
    return list_images(coco, "train2017")


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_state_costs_its_layer_that_image_alone(train_probes, images, monkeypatch, value):
    """The layer learns what it learns where the image does not exist; the other layer learns from all images."""
    clean, _ = train_probes("clean")
    without, _ = train_probes("without", without=[BAD])
    poison_states(monkeypatch, images, {2: [BAD]}, value)
    state, trainer = train_probes("bad")
    one, two = ProbeKey("gen", 1, 0), ProbeKey("gen", 2, 0)
    assert same(state.banks["none"].probes[one], clean.banks["none"].probes[one])
    assert state.losses[0][1] == pytest.approx(without.losses[0][1], rel=1e-5)
    for found, expected in zip(*(one.banks["none"].probes[two].parameters() for one in (state, without)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    for layer, reference in ((1, clean), (2, without)):
        for name, total in reference.ridge[None, layer].sums.items():
            torch.testing.assert_close(state.ridge[None, layer].sums[name], total, rtol=1e-5, atol=1e-5)
    assert {place: np.flatnonzero(bad).tolist() for place, bad in state.not_finite.items()} == {("layer", "2"): [BAD]}
    rows = not_finite_rows(state.not_finite, trainer.images.names, "train2017", "none")
    assert [(row["image"], row["layers"], row["teachers"]) for row in rows] == [(trainer.images.names[BAD], "2", "")]


def test_a_bad_target_costs_its_teacher_that_image_alone(train_probes, images, monkeypatch):
    clean, _ = train_probes("clean", teachers=("gen", "depth"))
    without, _ = train_probes("without", without=[BAD], teachers=("gen", "depth"))

    poison_targets(monkeypatch, "gen", images, [BAD])
    state, trainer = train_probes("bad", teachers=("gen", "depth"))
    for column, (control, key) in enumerate(state.columns):
        reference = without if key.teacher == "gen" else clean
        assert state.losses[0][column] == pytest.approx(reference.losses[0][column], rel=1e-5), key
        if key.teacher == "depth":
            assert same(state.banks[control].probes[key], clean.banks[control].probes[key])
    torch.testing.assert_close(trainer.means(state)["gen"], trainer.means(without)["gen"])
    torch.testing.assert_close(
        state.ridge[None, 2].sums["xy/gen"], without.ridge[None, 2].sums["xy/gen"], rtol=1e-5, atol=1e-5
    )
    assert list(state.not_finite) == [("teacher", "gen")]


@pytest.mark.parametrize("what", ["state", "target"])
def test_shuffled_pairs_lose_the_pair_of_the_bad_image(train_probes, images, monkeypatch, what):
    if what == "state":
        poison_states(monkeypatch, images, {1: [BAD]})
    else:
        poison_targets(monkeypatch, "gen", images, [BAD])
    state, trainer = train_probes("bad", layers=(1,), controls=("shuffled",), micro_batch=12)
    monkeypatch.undo()
    (order,) = plan_steps(12, trainer.recipe.fit)[0].micros
    pictures = [square(trainer.images.read(index)) for index in order]
    states, _ = load_run_backbone(trainer.recipe, "none", CPU).hidden_states(pictures, "1")
    teacher = load_teachers(trainer.recipe.teachers, CPU)["gen"]
    target = teacher.target(teacher.prepare(pictures))
    bank = ProbeBank.build({"gen": ResamplerConfig(32, 1, 12, 12)}, [1], [0], ["image"], CPU)
    predicted = bank.probes[ProbeKey("gen", 1, 0)](states[1])
    pairs = [(row, (row - 1) % 12) for row in range(12)]
    finite = [pair for pair in pairs if order[pair[what == "target"]] != BAD]
    losses = [F.smooth_l1_loss(predicted[row], target[other]).item() for row, other in finite]
    assert len(losses) == 11 and state.losses[0][0] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_layer_without_any_finite_image_is_not_trained(train_probes, images, monkeypatch):
    clean, _ = train_probes("clean")
    poison_states(monkeypatch, images, {2: range(12)})
    state, trainer = train_probes("bad")
    one, two = ProbeKey("gen", 1, 0), ProbeKey("gen", 2, 0)
    assert same(state.banks["none"].probes[one], clean.banks["none"].probes[one])
    assert same(state.banks["none"].probes[two], trainer.initial_state().banks["none"].probes[two])
    losses = np.array(state.losses)
    assert np.isnan(losses[:, 1]).all() and np.isfinite(np.delete(losses, 1, axis=1)).all()
    assert judge(losses[:, 1], losses[:, 2]).state == NOT_TRAINED
    assert all(part.isnan().all() for part in trainer.readout(state).maps["gen", 2])


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_bad_gradient_never_reaches_the_optimiser(train_probes, clip):
    """In the second of four steps, of one probe: that step is not taken, and nothing else notices."""
    hurt, seen = ProbeKey("gen", 1, 0), {}

    def prepare(trainer):
        step = ProbeTrainer.take_step

        def stepped(state, *rest, **more):
            parameter = state.parameters[0][0]
            handle = None
            if state.step == 1:
                handle = parameter.register_hook(lambda gradient: gradient * math.nan)
                seen["before"] = [p.detach().clone() for p in state.parameters[0]]
                seen["moment"] = state.optimizer.state[parameter]["exp_avg"].clone()
            row = step(trainer, state, *rest, **more)
            if handle:
                handle.remove()
                unchanged = zip(seen["before"], state.parameters[0], strict=True)
                seen["unchanged"] = all(torch.equal(a, b) for a, b in unchanged)
                seen["moments unchanged"] = torch.equal(seen["moment"], state.optimizer.state[parameter]["exp_avg"])
            return row

        trainer.take_step = stepped

    fields = {"epochs": 2, "batch_size": 6, "micro_batch": 6, "max_grad_norm": clip}
    clean, _ = train_probes("clean", **fields)
    state, _ = train_probes("hurt", prepare=prepare, **fields)
    assert seen["unchanged"] and seen["moments unchanged"]
    assert np.isnan(state.losses)[:, 0].tolist() == [False, True, False, False]
    assert all(p.isfinite().all() for p in state.banks["none"].probes[hurt].parameters())
    assert same(state.banks["none"].probes[ProbeKey("gen", 2, 0)], clean.banks["none"].probes[ProbeKey("gen", 2, 0)])


def test_bad_images_are_remembered_over_an_interruption(train_probes, images, monkeypatch):
    poison_states(monkeypatch, images, {2: [BAD]})
    fields = {"epochs": 2, "batch_size": 6, "micro_batch": 3, "save_minutes": 0}
    whole, _ = train_probes("whole", **fields)

    class StopError(Exception):
        pass

    def prepare(trainer):
        step = ProbeTrainer.take_step

        def stopped(state, *rest, **more):
            if state.step == 3:
                raise StopError
            return step(trainer, state, *rest, **more)

        trainer.take_step = stopped

    with pytest.raises(StopError):
        train_probes("cut", prepare=prepare, **fields)
    cut, _ = train_probes("cut", **fields)
    assert cut.losses == whole.losses
    assert {place: bad.tolist() for place, bad in cut.not_finite.items()} == {
        place: bad.tolist() for place, bad in whole.not_finite.items()
    }
    assert all(same(cut.banks["none"].probes[key], probe) for key, probe in whole.banks["none"].probes.items())


def test_a_run_names_what_it_left_out(images, recipe_values, tmp_path, monkeypatch, caplog):
    recipe_values["fit"] |= {"ridge": True}
    recipe_values["controls"] = ["random"]
    recipe_values["teachers"].pop("seg")
    recipe_values["layers"] = "1,2,3,final"
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    poison_states(monkeypatch, images, {2: [BAD], 3: range(12), "final": range(12)})
    with caplog.at_level(logging.WARNING):
        run = train(recipe, tmp_path / "run")
    name = images.names[BAD]
    said = [record.getMessage() for record in caplog.records if record.name == "probing.models.finite"]
    assert [line.split(",")[0] for line in said] == [
        "layer 2: 1 of 12 images left out",
        "layers 3",
        "layer 2 (random): 1 of 12 images left out",
        "layers 3",
    ]
    assert name in said[0] and "no image has finite hidden states" in said[1]
    manifest = json.loads((run.path / "manifest.json").read_text())
    rows = {(row["image"], row["control"]): row["layers"] for row in manifest["not_finite"]}
    assert len(rows) == 24 and rows[name, "none"] == rows[name, "random"] == "2-3,final"
    assert sum(layers == "3,final" for layers in rows.values()) == 22
    states = {(row["control"], row["layer"]): row for row in manifest["convergence"]}
    for (_, layer), row in states.items():
        assert (row["state"] == NOT_TRAINED) == (row["last_loss"] is None) == (layer in ("3", "final"))
        assert row["steps_not_taken"] == (4 if layer in ("3", "final") else 0)
    assert "NaN" not in (run.path / "manifest.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_are_judged_by_every_number(dtype, value):
    values = torch.full((4, 3, 5), torch.finfo(dtype).max, dtype=dtype)
    values[1, 2, 4] = value
    values[3, 0, 0] = value
    assert finite_rows(values).tolist() == [True, False, True, False]
    assert finite_rows(values.transpose(1, 2)).tolist() == [True, False, True, False]


def test_layers_are_named_as_they_are_selected():
    assert layer_ranges(["final", "3", "2", "7", "4", "0"]) == "0,2-4,7,final" and layer_ranges([]) == ""


def test_teachers_without_finite_features_are_named(caplog):
    masks = {("teacher", "gen"): np.array([True, True]), ("teacher", "depth"): np.array([False, True])}
    report_not_finite(masks, ["a.jpg", "b.jpg"], 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("teacher gen: no image has finite features")
    assert second == "teacher depth: 1 of 2 images left out, their features are not finite, first b.jpg"


@pytest.mark.parametrize(
    ("stored", "requested", "slow"),
    [
        *[(stored, "auto", True) for stored in ("bfloat16", "float16", "float32", "bfloat16, unstated")],
        *[("bfloat16", requested, True) for requested in ("bfloat16", "float16", "float32")],
        ("bfloat16", "auto", False),
    ],
)
def test_auto_avoids_bfloat16_on_cpus_without_it(tmp_path, monkeypatch, caplog, stored, requested, slow):
    """Under `auto` alone, whether the configuration states the type or the weights show it."""
    from transformers import LlavaForConditionalGeneration

    folder, dtype = tiny.llava(tmp_path / "llava", layers=1), stored.split(",")[0]
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    if stored.endswith("unstated"):
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(pretrained, "slow_in_bfloat16", lambda device: slow)
    with caplog.at_level(logging.INFO):
        backbone = load_backbone(BackboneRecipe(checkpoint=str(folder), dtype=requested), CPU)
    widened = requested == "auto" and slow and dtype == "bfloat16"
    expected = "float32" if widened else dtype if requested == "auto" else requested
    assert {parameter.dtype for parameter in backbone.core.parameters()} == {getattr(torch, expected)}
    assert sum("float32 instead of bfloat16" in record.getMessage() for record in caplog.records) == widened
    assert isinstance(backbone, Backbone)
