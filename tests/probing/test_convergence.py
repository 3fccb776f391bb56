import numpy as np
import pytest

from probing.convergence import judge

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
def test_curves_are_judged_as_a_person_would(curve, state):
    noise = 1 + 0.01 * RNG.standard_normal(500)
    assert judge(curve * DIFFICULTY * noise, DIFFICULTY).state == state


def test_batch_difficulty_alone_is_no_progress():
    easier = np.linspace(1.2, 0.8, 500)
    assert judge(0.5 * easier, easier).state == "flat"


def test_too_few_steps_to_tell():
    assert judge(np.array([0.1]), np.array([1.0])).state == "still falling"
