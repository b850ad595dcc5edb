"""Means over an epoch, summed on the device and read once."""

from typing import TypedDict

import torch
from torch import Tensor


class MeansState(TypedDict):
    """The state of :class:`RunningMeans`: names, and sums now and before the current step, ``(2, 2, names)``."""

    names: list[str]
    sums: Tensor | None


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
        """Add one batch: each value is a mean over as many rows as its count."""
        means = torch.stack([value.detach().float() for value in values.values()])
        weights = torch.stack([_as_scalar(counts[name], means) for name in values])
        batch = torch.stack([means * weights, weights])
        self.names = tuple(values)
        self.sums = batch if self.sums is None else self.sums.to(batch.device) + batch

    def begin_step(self) -> None:
        """Remember the sums, so that :meth:`undo_step` can restore them."""
        self._before = self.sums

    def undo_step(self, undone: Tensor) -> None:
        """Restore the sums from before the step where ``undone``, a boolean scalar on the device, is true."""
        if self.sums is not None:
            self.sums = torch.where(undone, self._sums_before(self.sums), self.sums)

    def compute(self, total: Tensor | None = None) -> dict[str, Tensor]:
        """Return the means, NaN where nothing was counted.

        Args:
            total: Sums to use in place of this object's, for example those of all ranks.
        """
        sums = self.sums if total is None else total
        return {} if sums is None else dict(zip(self.names, sums[0] / sums[1], strict=True))

    def state_dict(self) -> MeansState:
        """Return the sums now and before the current step, ``(2, 2, names)``."""
        sums = None if self.sums is None else torch.stack([self.sums, self._sums_before(self.sums)])
        return {"names": list(self.names), "sums": sums}

    def load_state_dict(self, state: MeansState) -> None:
        """Continue from saved sums."""
        self.names = tuple(state["names"])
        self.sums, self._before = (None, None) if state["sums"] is None else state["sums"].unbind()

    def _sums_before(self, sums: Tensor) -> Tensor:
        return torch.zeros_like(sums) if self._before is None else self._before.to(sums.device)


def _as_scalar(count: Tensor | int, like: Tensor) -> Tensor:
    """Return a float on the device; filling in a number, unlike a copy, does not wait for the device."""
    return count.to(like) if isinstance(count, Tensor) else like.new_full((), count)
