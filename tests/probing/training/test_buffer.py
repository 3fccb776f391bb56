"""Training with a buffer of hidden states."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probing.data.coco import list_images
from probing.models.base import Backbone
from probing.recipe import FitRecipe
from probing.training.buffer import ActivationBuffer, choose_window
from probing.training.schedule import MIN_WINDOW, last_visits, plan_steps
from probing.training.trainer import ProbeTrainer
from probing.utils.errors import UserError
from probing.utils.interrupt import Interrupted
from tests.helpers import tiny, trainer

CPU = torch.device("cpu")


@pytest.fixture
def make_trainer(recipe_values, tmp_path):
    """Makes a trainer of two epochs with batches of two images, from a folder and fields."""

    def make(name, checkpoint=None, **fields):
        backbone = {"checkpoint": checkpoint or recipe_values["backbone"]["checkpoint"]}
        fit = {"batch_size": 2, "micro_batch": 2} | fields
        values = recipe_values | {"backbone": backbone}
        return trainer.make_trainer(values, tmp_path / name, [0, 2, "final"], ["none", "shuffled"], **fit)

    return make


@pytest.fixture
def passes(monkeypatch):
    """Images that went through the backbone."""
    seen = []
    stream = Backbone.stream

    def count(self, batch, *rest):
        seen.append(len(batch.tokens.kinds))
        stream(self, batch, *rest)

    monkeypatch.setattr(Backbone, "stream", count)
    return seen


@given(
    images=st.integers(1, 60), epochs=st.integers(2, 12), batch=st.integers(2, 9), extra=st.integers(0, 40),
    processes=st.integers(1, 3),
)  # fmt: skip
def test_plan_visits_each_image_once_per_epoch(images, epochs, batch, extra, processes):
    fit = FitRecipe(epochs=epochs, batch_size=batch, micro_batch=2)
    window = MIN_WINDOW * batch + extra
    plans = [plan_steps(images, fit, rank, processes, window) for rank in range(processes)]
    assert len({len(plan) for plan in plans}) == 1
    visits, held, owner = np.zeros(images, dtype=int), set(), {}
    leaving = [last_visits(plan) for plan in plans]
    for number, steps in enumerate(zip(*plans, strict=True)):
        batch_images = [image for step in steps for micro in step.micros for image in micro]
        assert len(set(batch_images)) == len(batch_images) <= batch
        for rank, step in enumerate(steps):
            for image in (image for micro in step.micros for image in micro):
                assert step.first == (image not in owner) and owner.setdefault(image, rank) == rank
        visits[batch_images] += 1
        held |= set(batch_images)
        assert len(held) <= window
        held -= {image for rank in range(processes) for image in leaving[rank][number]}
    assert (visits == epochs).all() and not held


def test_window_of_all_images_gives_ordinary_epochs():
    fit = FitRecipe(epochs=3, batch_size=8, micro_batch=3)
    assert plan_steps(21, fit, window=21) == plan_steps(21, fit)


def test_several_epochs_need_one_forward_pass(make_trainer, passes, monkeypatch):
    plain = make_trainer("plain", epochs=4).run()
    assert sum(passes) == 4 * 12
    passes.clear()
    buffered = make_trainer("buffered", epochs=4, buffer=1.0).run()
    assert sum(passes) == 12
    np.testing.assert_allclose(buffered.losses, plain.losses, rtol=1e-4)
    for key, sums in plain.ridge.items():
        assert all(torch.equal(sums.sums[part], buffered.ridge[key].sums[part]) for part in sums.sums)


def test_stopped_run_with_a_small_window_resumes_exactly(make_trainer, coco, tmp_path, monkeypatch):
    broken = tiny.coco(tmp_path / "coco")
    (broken / "train2017" / list_images(coco, "train2017").names[5]).write_bytes(b"broken")
    fields = {"epochs": 4, "buffer": "auto"}
    monkeypatch.setattr("probing.training.trainer.plan_window", lambda *_: 7)

    def trainer(name):
        made = make_trainer(name, **fields)
        made.images = list_images(broken, "train2017")
        return made

    whole = trainer("whole").run()
    step = ProbeTrainer.take_step

    def stop_at(number):
        def take(self, state, *rest):
            if state.step == number:
                raise Interrupted
            self.recipe.fit.save_minutes = 0  # after every step
            return step(self, state, *rest)

        return take

    for number in (3, 11, 20):
        with monkeypatch.context() as patch:
            patch.setattr(ProbeTrainer, "take_step", stop_at(number))
            with pytest.raises(Interrupted):
                trainer("cut").run()
    resumed = trainer("cut").run()
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert set(resumed.skipped) == set(whole.skipped) and len(whole.skipped) == 1
    for one, other in zip(resumed.parameters, whole.parameters, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_buffer_returns_the_positions_that_probes_read():
    """Sequences of different lengths, put in one by one and read together."""
    torch.manual_seed(0)
    buffer = ActivationBuffer([0, "final"], CPU)
    positions = {3: [0, 1, 3], 8: [0]}
    states = {index: torch.randn(1, 4, 5) for index in positions}
    for index, chosen in positions.items():
        buffer.add_targets([index], {"gen": torch.full((1, 1, 2), float(index))})
        for layer in (0, "final"):
            buffer.add_states([index], layer, states[index] + (layer == 0), [torch.tensor(chosen)])
    prepared = buffer.prepared([8, 5, 3])
    assert prepared.indices == [8, 3] and prepared.cached_targets["gen"][:, 0, 0].tolist() == [8, 3]
    found, mask = buffer.states([8, 3], "final")
    assert mask is not None and mask.tolist() == [[True, False, False], [True] * 3]
    assert torch.equal(found[1], states[3][0, [0, 1, 3]]) and torch.equal(found[0, 0], states[8][0, 0])
    buffer.drop([8])
    found, mask = buffer.states([3], 0)
    assert mask is None and torch.equal(found[0], states[3][0, [0, 1, 3]] + 1)


def test_memory_decides_the_window(monkeypatch):
    def window(**fields):
        return choose_window(FitRecipe(batch_size=4, micro_batch=2, **fields), 1000, 10**6)

    assert window(buffer=0.1) == 100 and window(buffer=9) == 1000
    with pytest.raises(UserError, match=r"fit.buffer=0.01 is below 3 batches; give 0.012 GB or more"):
        window(buffer=0.01)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 4 * 10**8})())
    assert window(buffer="auto") == 200
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**7})())
    assert window(buffer="auto") == 0
