"""Timing of short functions."""

import time
from collections.abc import Callable

TURNS = 5


def best_in_turns(works: dict[str, Callable[[], object]], seconds: float = 20) -> dict[str, float]:
    """Shortest of many timings of each, in milliseconds.

    The functions take turns, so that other work on the machine disturbs all alike: at least `TURNS` times, and until
    `seconds` have passed, because a short function needs many timings to find its best.
    """
    best = dict.fromkeys(works, float("inf"))
    turns, begun = 0, time.perf_counter()
    while turns < TURNS or time.perf_counter() - begun < seconds:
        turns += 1
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best
