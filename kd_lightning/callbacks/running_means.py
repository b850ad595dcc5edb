"""Means over an epoch, summed on the device and read once."""

from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """Weighted means of named scalars, kept as one tensor of sums so that no step waits for the device.

    Example:
        >>> means = RunningMeans()
        >>> means.add({"loss": torch.tensor(1.0)}, {"loss": torch.tensor(3)})
        >>> means.add({"loss": torch.tensor(2.0)}, {"loss": torch.tensor(1)})
        >>> means.compute()
        {'loss': tensor(1.2500)}
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None
        self._before: Tensor | None = None

    def add(self, values: dict[str, Tensor], counts: dict[str, Tensor | int]) -> None:
        """Add one step: each value is a mean over as many rows as its count says."""
        means = torch.stack([value.detach().float() for value in values.values()])
        weights = torch.stack([_as_scalar(counts[name], means) for name in values])
        step = torch.stack([means * weights, weights])
        self.names = tuple(values)
        self.sums = step if self.sums is None else self.sums.to(step.device) + step

    def begin_step(self) -> None:
        """From here on a step of the optimizer can be undone."""
        self._before = self.sums

    def undo_step(self, undone: Tensor) -> None:
        """Forget what was added since, if ``undone`` (on the device) says so."""
        if self.sums is not None:
            self.sums = torch.where(undone, self._or_zeros(self.sums), self.sums)

    def _or_zeros(self, sums: Tensor) -> Tensor:
        return torch.zeros_like(sums) if self._before is None else self._before.to(sums.device)

    def compute(self, total: Tensor | None = None) -> dict[str, Tensor]:
        """The means; NaN where nothing was counted. ``total`` replaces the sums, for example by those of all ranks."""
        sums = self.sums if total is None else total
        return {} if sums is None else dict(zip(self.names, sums[0] / sums[1], strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The sums so far and before the step under way, plain."""
        sums = None if self.sums is None else torch.stack([self.sums, self._or_zeros(self.sums)])
        return {"names": list(self.names), "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved sums."""
        self.names = tuple(state["names"])
        self.sums, self._before = (None, None) if state["sums"] is None else state["sums"].unbind()


def _as_scalar(count: Tensor | int, like: Tensor) -> Tensor:
    """A float on the right device; a number is filled in there, which unlike a copy waits for nothing."""
    return count.to(like) if isinstance(count, Tensor) else like.new_full((), count)
