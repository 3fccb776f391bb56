"""Signals end loops between two steps, and nothing else survives them."""

import signal

import pytest

from probing.utils import interrupt
from probing.utils.interrupt import Interrupted, Interruption


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_repeated_signal_counts_once_and_a_later_one_stops(clock, number):
    """A launcher sends its processes again what SLURM or a terminal has sent to all."""
    with pytest.raises(Interrupted), Interruption().watch() as interruption:
        for _ in range(3):
            signal.raise_signal(number)
        assert interruption.requested
        clock[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_that_the_loop_did_not_see_is_not_lost(number):
    """It came in the last step, or after it."""
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), Interruption().watch():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_an_error_in_a_watched_loop_is_not_hidden():
    with pytest.raises(ZeroDivisionError), Interruption().watch():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError
