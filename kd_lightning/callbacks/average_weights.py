"""A running average of the weights, for trainings of any length."""

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from kd_lightning.errors import UserError


class AverageWeights(WeightAveraging):
    """Keeps an exponential moving average of the weights, which is validated, tested and saved in their place.

    After n updates a weight of the average moves by ``1 - min(decay, (1 + n) / (10 + n))`` towards the trained one: in
    short trainings the average does not stay near the first weights, as one of a constant decay of 0.999 would for a
    thousand steps. Statistics of batch norms are averaged too.

    Args:
        decay: Largest decay, in (0, 1).

    Raises:
        UserError: If the decay is outside its range.

    Example:
        >>> [round(1 - decay_of(n, 0.999), 3) for n in (0, 10, 100, 100_000)]
        [0.9, 0.45, 0.082, 0.001]
    """

    def __init__(self, *, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"decay must be between 0 and 1, got {decay}.")
        super().__init__(multi_avg_fn=self._update)
        self.decay = decay

    def _update(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        if not averaged[0].is_floating_point():
            torch._foreach_copy_(averaged, current)
            return
        # the number of updates on the host: that on the device would have to be waited for
        torch._foreach_lerp_(averaged, current, 1 - decay_of(self._latest_update_step, self.decay))


def decay_of(updates: int, largest: float) -> float:
    """Return the decay after a number of updates."""
    return min(largest, (1 + updates) / (10 + updates))
