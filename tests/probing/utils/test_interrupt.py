"""Signals stop loops between two steps."""

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
def test_repeated_signal_counts_once_and_later_one_stops(clock, number):
    """A launcher repeats the signal that SLURM or a terminal has sent to all processes."""
    with pytest.raises(Interrupted), Interruption().watch() as interruption:
        for _ in range(3):
            signal.raise_signal(number)
        assert interruption.requested
        clock[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_unhandled_signal_raises_when_the_loop_ends(number):
    """It arrived in or after the last step."""
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), Interruption().watch():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_error_in_watched_loop_is_raised():
    with pytest.raises(ZeroDivisionError), Interruption().watch():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError
