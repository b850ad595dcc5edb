"""Time alternatives against each other in one process."""

import time
from collections.abc import Callable, Mapping

import torch


def time_rounds(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each candidate took in each round, by name.

    The candidates alternate, so that a change in the machine's speed affects all of them. A first round, which is not
    counted, warms up, compiles and fills caches. On a GPU the time ends when the device has finished.

    Args:
        candidates: Functions to time.
        rounds: Number of rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def repeat(function: Callable[[], object], times: int) -> Callable[[], None]:
    """Return a function that calls another function several times."""

    def run() -> None:
        for _ in range(times):
            function()

    return run
