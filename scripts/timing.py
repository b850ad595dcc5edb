"""Times alternatives against each other in one process."""

import time
from collections.abc import Callable, Mapping

import torch


def time_rounds(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each side took in each round, by its name.

    The sides take turns, so that a change of the machine's speed meets all of them. A first round, which is not
    counted, warms up, compiles and fills caches. On a GPU the time ends when the device has finished.

    Args:
        sides: Functions to time.
        rounds: Number of rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def repeat(function: Callable[[], object], times: int) -> Callable[[], None]:
    """Return a function that calls another one several times."""

    def run() -> None:
        for _ in range(times):
            function()

    return run
