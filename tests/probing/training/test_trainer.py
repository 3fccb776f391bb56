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
from probing.teachers import load_teachers
from probing.training.run import load_run_backbone, training_images
from probing.training.schedule import learning_rate, plan_steps, require_enough
from probing.training.sizes import probe_parameters
from probing.training.trainer import ProbeTrainer
from probing.utils.errors import UserError
from probing.utils.images import square

CPU = torch.device("cpu")


@pytest.fixture
def train_probes(recipe_values, tmp_path):
    """Trains probes with some fields changed; returns final state and trainer."""

    def run(layers=(0, 1, 2, 3), controls=("none", "shuffled"), teachers=("depth", "seg", "gen"), name="", **changes):
        values = dict(recipe_values, fit=recipe_values["fit"] | changes)
        values["teachers"] = {teacher: values["teachers"][teacher] for teacher in teachers}
        recipe = ProbeRunRecipe.model_validate(values)
        images = training_images(recipe.data)
        trainer = ProbeTrainer(
            recipe,
            load_run_backbone(recipe, "none", CPU),
            load_teachers(recipe.teachers, CPU),
            images,
            list(layers),
            list(controls),
            tmp_path / f"state{name}",
            Accelerator(cpu=True),
        )
        return trainer.run(), trainer

    return run


def test_joint_training_equals_separate_training_bitwise(train_probes):
    joint, _ = train_probes(name="joint", seeds=[0, 1])
    for teacher, layer, seed, control in (("depth", 2, 0, "none"), ("gen", 3, 1, "none"), ("seg", 0, 1, "shuffled")):
        # The order of the images follows the first seed: give the single run the same one.
        separate, _ = train_probes(
            (layer,), (control,), (teacher,), name=f"{teacher}{layer}", seeds=[0, 1] if seed else [0]
        )
        key = ProbeKey(teacher, layer, seed)
        expected = separate.banks[control].probes[key].state_dict()
        found = joint.banks[control].probes[key].state_dict()
        assert all(torch.equal(found[part], expected[part]) for part in expected), key


def test_one_step_follows_a_plain_loop(train_probes):
    """The first optimiser step, written out: mean smooth L1 over the batch, clipping per probe, AdamW."""
    state, trainer = train_probes((2,), ("none",), ("depth",), epochs=1, batch_size=12, micro_batch=5)
    teacher, config = trainer.teachers["depth"], ResamplerConfig(32, 16, 16, 16)
    probe = ProbeBank.build({"depth": config}, [2], [0], ["image"], CPU).probes[ProbeKey("depth", 2, 0)]
    pictures = [square(trainer.images.read(index)) for index in range(12)]
    states, _ = trainer.backbone.hidden_states(pictures, "2")
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


def test_accumulation_does_not_change_the_result(train_probes):
    large, _ = train_probes((1,), ("none",), ("depth",), name="l", micro_batch=6)
    small, _ = train_probes((1,), ("none",), ("depth",), name="s", micro_batch=2)
    np.testing.assert_allclose([row[0] for row in large.losses], [row[0] for row in small.losses], rtol=1e-4)


def test_bf16_training_is_close_to_float32(train_probes):
    full, _ = train_probes((2,), ("none",), name="float32")
    half, _ = train_probes((2,), ("none",), name="bfloat16", bf16=True)
    for key, probe in full.banks["none"].probes.items():
        for name, expected in probe.state_dict().items():
            found = half.banks["none"].probes[key].state_dict()[name]
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() < 0.01
    assert not torch.equal(torch.tensor(full.losses), torch.tensor(half.losses))
    torch.testing.assert_close(torch.tensor(full.losses), torch.tensor(half.losses), rtol=0.02, atol=1e-3)


def test_shuffled_control_trains_on_targets_of_other_images(train_probes):
    state, trainer = train_probes((1,), ("shuffled",), ("gen",), epochs=1, batch_size=12, micro_batch=12)
    (order,) = plan_steps(12, trainer.recipe.fit)[0].micros
    pictures = [square(trainer.images.read(index)) for index in order]
    states, _ = trainer.backbone.hidden_states(pictures, "1")
    teacher = trainer.teachers["gen"]
    target = teacher.target(teacher.prepare(pictures))
    probe = ProbeBank.build({"gen": ResamplerConfig(32, 1, 12, 12)}, [1], [0], ["image"], CPU).probes[
        ProbeKey("gen", 1, 0)
    ]
    others = torch.stack([target[index - 1] for index in range(12)])
    assert not (others == target).all(dim=-1).any()
    assert state.losses[0][0] == pytest.approx(F.smooth_l1_loss(probe(states[1]), others).item(), rel=1e-4)


def test_ridge_equals_penalised_least_squares(train_probes):
    state, trainer = train_probes((2,), ("none",), ("depth", "gen"), epochs=2)
    pictures = [square(trainer.images.read(index)) for index in range(len(trainer.images))]
    states, tokens = trainer.backbone.hidden_states(pictures, "2")
    image_states = tokens.image_states(states[2]).double()
    readout = trainer.readout(state)
    for name, x in (("depth", image_states.flatten(0, 1)), ("gen", image_states.mean(1))):
        teacher = trainer.teachers[name]
        y = teacher.target(teacher.prepare(pictures)).double().flatten(0, 1)
        level = 1e-3 * (x - x.mean(0)).square().mean(0).mean()
        # Augmented least squares: rows of sqrt(n * level) that ask every coefficient but the intercept to be zero.
        design = torch.cat([torch.cat([x, torch.ones(len(x), 1)], 1), torch.eye(33)[:32] * (len(x) * level).sqrt()])
        solution = torch.linalg.lstsq(design.double(), torch.cat([y, torch.zeros(32, y.shape[1])]).double()).solution
        weight, bias = readout.maps[name, 2]
        torch.testing.assert_close(weight.double().T, solution[:32], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(bias.double(), solution[32], rtol=1e-3, atol=1e-4)


def test_mean_target_counts_each_training_image_once(train_probes):
    state, trainer = train_probes((1,), ("none",), ("seg",), epochs=3)
    pictures = [square(trainer.images.read(index)) for index in range(len(trainer.images))]
    teacher = trainer.teachers["seg"]
    torch.testing.assert_close(trainer.means(state)["seg"], teacher.target(teacher.prepare(pictures)).mean(0))
    assert state.target_sums["seg"][1] == len(trainer.images)


def test_each_epoch_has_all_images_in_a_new_order():
    fit = FitRecipe(epochs=3, batch_size=8, micro_batch=3)
    steps = [step.micros for step in plan_steps(21, fit)]
    assert [sum(map(len, step)) for step in steps] == [8, 8, 5] * 3
    assert max(len(micro) for step in steps for micro in step) <= 3
    orders = [[i for step in steps[e : e + 3] for micro in step for i in micro] for e in (0, 3, 6)]
    assert all(sorted(order) == list(range(21)) for order in orders) and orders[0] != orders[1]
    halves = [[step.micros for step in plan_steps(21, fit, process, 2)] for process in (0, 1)]
    for whole, first, second in zip(steps, *halves, strict=True):
        assert sorted(i for m in whole for i in m) == sorted(i for m in [*first, *second] for i in m)


def test_every_process_can_pair_images():
    """A process with one image per batch never trains the shuffled control."""
    fit = FitRecipe(batch_size=6)
    require_enough(12, fit, 3)
    assert all(len(micro) > 1 for rank in range(3) for step in plan_steps(12, fit, rank, 3) for micro in step.micros)
    for images, processes in ((12, 4), (5, 3)):
        with pytest.raises(UserError, match=f"{processes} processes for {images} images in batches of 6"):
            require_enough(images, fit, processes)


def test_learning_rate_equals_transformers_cosine_schedule():
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


def test_saved_bank_loads_whole_or_by_layer(tmp_path):
    bank = ProbeBank.build({"gen": ResamplerConfig(8, 1, 12, 12)}, [0, 2, "final"], [0, 5], ["image"], CPU)
    bank.save(tmp_path, {"prompt": "p", "teachers": {"gen": {"id": "x"}}})
    whole = ProbeBank.load(tmp_path, CPU)
    assert whole.probes.keys() == bank.probes.keys()
    for key, probe in bank.probes.items():
        assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), whole.probes[key].parameters(), strict=True))
    part = ProbeBank.load(tmp_path, CPU, ["gen"], "final")
    assert set(part.probes) == {ProbeKey("gen", "final", 0), ProbeKey("gen", "final", 5)}


@pytest.mark.parametrize("probe", [{}, {"ff_mult": 4}, {"heads": 2, "dim_head": 8}, {"heads": 3, "ff_mult": 2}])
def test_probe_parameters_equals_built_probes(recipe_values, tmp_path, probe):
    recipe = ProbeRunRecipe.model_validate(recipe_values | {"probe": probe})
    backbone, teachers, layers, controls = (
        load_run_backbone(recipe, "none", CPU),
        load_teachers(recipe.teachers, CPU),
        [0, 2],
        ["none"],
    )
    images = training_images(recipe.data)
    trainer = ProbeTrainer(recipe, backbone, teachers, images, layers, controls, tmp_path, Accelerator(cpu=True))
    built = sum(p.numel() for probe in trainer.initial_state().parameters for p in probe)
    assert len(layers) * probe_parameters(recipe, backbone.hidden_size, teachers) == built
