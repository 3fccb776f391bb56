import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import get_cosine_schedule_with_warmup

from probing.probes.bank import ProbeBank, ProbeKey
from probing.probes.resampler import ResamplerConfig
from probing.recipe import FitRecipe, ProbeRunRecipe
from probing.training.run import load_run_backbone, load_teachers, training_images
from probing.training.schedule import learning_rate, plan_steps
from probing.training.sizes import probe_parameters
from probing.training.trainer import ProbeTrainer
from probing.utils.images import square

CPU = torch.device("cpu")


@pytest.fixture
def fitted(recipe_values, tmp_path):
    """Runs a fit with some fields changed; returns its final state and the ProbeTrainer."""

    def run(layers=(0, 1, 2, 3), controls=("none", "shuffled"), teachers=("depth", "seg", "gen"), name="", **changes):
        values = dict(recipe_values, fit=recipe_values["fit"] | changes)
        values["teachers"] = {teacher: values["teachers"][teacher] for teacher in teachers}
        recipe = ProbeRunRecipe.model_validate(values)
        images = training_images(recipe.data)
        fit = ProbeTrainer(
            recipe,
            load_run_backbone(recipe, "none", CPU),
            load_teachers(recipe, CPU),
            images,
            list(layers),
            list(controls),
            tmp_path / f"state{name}",
            Accelerator(cpu=True),
        )
        return fit.run(), fit

    return run


def test_joint_training_is_bit_equal_to_training_one_probe_alone(fitted):
    together, _ = fitted(name="joint", seeds=[0, 1])
    for teacher, layer, seed, control in (("depth", 2, 0, "none"), ("gen", 3, 1, "none"), ("seg", 0, 1, "shuffled")):
        # The order of the images follows the first seed: give the single run the same one.
        alone, _ = fitted((layer,), (control,), (teacher,), name=f"{teacher}{layer}", seeds=[0, 1] if seed else [0])
        key = ProbeKey(teacher, layer, seed)
        expected = alone.banks[control].probes[key].state_dict()
        found = together.banks[control].probes[key].state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), key


def test_one_step_follows_a_plain_loop(fitted):
    """The first optimiser step, written out: mean smooth L1 over the batch, clipping per probe, AdamW."""
    state, fit = fitted((2,), ("none",), ("depth",), epochs=1, batch_size=12, micro_batch=5)
    teacher, config = fit.teachers["depth"], ResamplerConfig(32, 16, 16, 16)
    probe = ProbeBank.build({"depth": config}, [2], [0], ["image"], CPU).probes[ProbeKey("depth", 2, 0)]
    pictures = [square(fit.images.read(index)) for index in range(12)]
    states, _ = fit.backbone.hidden_states(pictures, "2")
    target = teacher.target(teacher.prepare(pictures))
    difference = probe(states[2]) - target
    loss = torch.where(difference.abs() < 1, 0.5 * difference**2, difference.abs() - 0.5).mean()
    loss.backward()
    assert state.losses[0][0] == pytest.approx(loss.item(), rel=1e-5)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in probe.parameters()))
    trained = state.banks["none"].probes[ProbeKey("depth", 2, 0)]
    rate = 1e-3  # one step: warm-up ends with it
    for before, after in zip(probe.parameters(), trained.parameters(), strict=True):
        gradient = before.grad * min(1.0, 1 / (norm + 1e-6))
        # Adam's first step: both moments are bias-corrected to the gradient itself.
        expected = before - rate * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-5  # elsewhere the sign is rounding
        torch.testing.assert_close(after[clear], expected[clear], rtol=1e-3, atol=1e-6)


def test_accumulation_does_not_change_the_result(fitted):
    large, _ = fitted((1,), ("none",), ("depth",), name="l", micro_batch=6)
    small, _ = fitted((1,), ("none",), ("depth",), name="s", micro_batch=2)
    np.testing.assert_allclose([row[0] for row in large.losses], [row[0] for row in small.losses], rtol=1e-4)


def test_products_in_bfloat16_train_nearly_the_same(fitted):
    whole, _ = fitted((2,), ("none",), name="float32")
    short, _ = fitted((2,), ("none",), name="bfloat16", bf16=True)
    for key, probe in whole.banks["none"].probes.items():
        for name, expected in probe.state_dict().items():
            found = short.banks["none"].probes[key].state_dict()[name]
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() < 0.01
    assert not torch.equal(torch.tensor(whole.losses), torch.tensor(short.losses))
    torch.testing.assert_close(torch.tensor(whole.losses), torch.tensor(short.losses), rtol=0.02, atol=1e-3)


def test_shuffled_pairs_train_on_other_images_targets(fitted):
    state, fit = fitted((1,), ("shuffled",), ("gen",), epochs=1, batch_size=12, micro_batch=12)
    (order,) = plan_steps(12, fit.recipe.fit)[0]
    pictures = [square(fit.images.read(index)) for index in order]
    states, _ = fit.backbone.hidden_states(pictures, "1")
    teacher = fit.teachers["gen"]
    target = teacher.target(teacher.prepare(pictures))
    probe = ProbeBank.build({"gen": ResamplerConfig(32, 1, 12, 12)}, [1], [0], ["image"], CPU).probes[
        ProbeKey("gen", 1, 0)
    ]
    others = torch.stack([target[index - 1] for index in range(12)])
    assert not (others == target).all(dim=-1).any()
    assert state.losses[0][0] == pytest.approx(F.smooth_l1_loss(probe(states[1]), others).item(), rel=1e-4)


def test_ridge_equals_least_squares_with_a_penalty(fitted):
    state, fit = fitted((2,), ("none",), ("depth", "gen"), epochs=2)
    pictures = [square(fit.images.read(index)) for index in range(len(fit.images))]
    states, tokens = fit.backbone.hidden_states(pictures, "2")
    image_states = tokens.image_states(states[2]).double()
    readout = fit.readout(state)
    for name, x in (("depth", image_states.flatten(0, 1)), ("gen", image_states.mean(1))):
        teacher = fit.teachers[name]
        y = teacher.target(teacher.prepare(pictures)).double().flatten(0, 1)
        level = 1e-3 * (x - x.mean(0)).square().mean(0).mean()
        # Augmented least squares: rows of sqrt(n * level) that ask every coefficient but the intercept to be zero.
        design = torch.cat([torch.cat([x, torch.ones(len(x), 1)], 1), torch.eye(33)[:32] * (len(x) * level).sqrt()])
        solution = torch.linalg.lstsq(design.double(), torch.cat([y, torch.zeros(32, y.shape[1])]).double()).solution
        weight, bias = readout.maps[name, 2]
        torch.testing.assert_close(weight.double().T, solution[:32], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(bias.double(), solution[32], rtol=1e-3, atol=1e-4)


def test_mean_target_is_that_of_the_training_split_counted_once(fitted):
    state, fit = fitted((1,), ("none",), ("seg",), epochs=3)
    pictures = [square(fit.images.read(index)) for index in range(len(fit.images))]
    teacher = fit.teachers["seg"]
    torch.testing.assert_close(fit.means(state)["seg"], teacher.target(teacher.prepare(pictures)).mean(0))
    assert state.target_sums["seg"][1] == len(fit.images)


def test_every_epoch_sees_every_image_once_in_its_own_order():
    fit = FitRecipe(epochs=3, batch_size=8, micro_batch=3)
    steps = plan_steps(21, fit)
    assert [sum(map(len, step)) for step in steps] == [8, 8, 5] * 3
    assert max(len(micro) for step in steps for micro in step) <= 3
    orders = [[i for step in steps[e : e + 3] for micro in step for i in micro] for e in (0, 3, 6)]
    assert all(sorted(order) == list(range(21)) for order in orders) and orders[0] != orders[1]
    halves = [plan_steps(21, fit, process, 2) for process in (0, 1)]
    for whole, first, second in zip(steps, *halves, strict=True):
        assert sorted(i for m in whole for i in m) == sorted(i for m in [*first, *second] for i in m)


def test_learning_rate_is_the_usual_cosine_schedule():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    reference = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=100)
    rates = []
    for _ in range(100):
        rates.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    ours = [learning_rate(step, 100, 1e-3, 0.03) for step in range(100)]
    np.testing.assert_allclose(ours[3:], rates[3:], rtol=1e-12)
    np.testing.assert_allclose(ours[:3], [1e-3 / 3, 2e-3 / 3, 1e-3])  # never a wasted step at rate zero


def test_probes_can_be_saved_and_one_layer_read_alone(tmp_path):
    bank = ProbeBank.build({"gen": ResamplerConfig(8, 1, 12, 12)}, [0, 2, "final"], [0, 5], ["image"], CPU)
    bank.save(tmp_path, {"prompt": "p", "teachers": {"gen": {"id": "x"}}})
    whole = ProbeBank.load(tmp_path, CPU)
    assert whole.probes.keys() == bank.probes.keys()
    for key, probe in bank.probes.items():
        assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), whole.probes[key].parameters(), strict=True))
    part = ProbeBank.load(tmp_path, CPU, ["gen"], "final")
    assert set(part.probes) == {ProbeKey("gen", "final", 0), ProbeKey("gen", "final", 5)}


@pytest.mark.parametrize("probe", [{}, {"ff_mult": 4}, {"heads": 2, "dim_head": 8}, {"heads": 3, "ff_mult": 2}])
def test_counted_parameters_are_those_of_built_probes(recipe_values, tmp_path, probe):
    recipe = ProbeRunRecipe.model_validate(recipe_values | {"probe": probe})
    backbone, teachers, layers, controls = (
        load_run_backbone(recipe, "none", CPU),
        load_teachers(recipe, CPU),
        [0, 2],
        ["none"],
    )
    images = training_images(recipe.data)
    fit = ProbeTrainer(recipe, backbone, teachers, images, layers, controls, tmp_path, Accelerator(cpu=True))
    built = sum(p.numel() for own in fit.initial_state().parameters for p in own)
    assert len(layers) * probe_parameters(recipe, backbone.hidden_size, teachers) == built
