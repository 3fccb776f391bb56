"""How short works are timed."""

import time
from collections.abc import Callable


def best_in_turns(works: dict[str, Callable[[], object]], turns: int = 5, seconds: float = 20) -> dict[str, float]:
    """Shortest of many timings of each, in milliseconds.

    They take turns, lest something else on the machine decides; short ones take more of them, because their best is
    late to come.

    Args:
        works: by name.
        turns: at least so many.
        seconds: and for so long.
    """
    best = dict.fromkeys(works, float("inf"))
    begun = time.perf_counter()
    while turns > 0 or time.perf_counter() - begun < seconds:
        turns -= 1
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best
