"""Means over an epoch, summed on the device and read once."""

from collections.abc import Collection
from typing import TypedDict

import torch
from torch import Tensor

from kd_lightning.data.augmentation.constants import constant


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
        self._sums: Tensor | None = None
        self._before: Tensor | None = None
        self._is_empty = True

    @property
    def sums(self) -> Tensor | None:
        """Sums of the values and of their counts, float32 ``(2, names)``; ``None`` where nothing was added."""
        return None if self._is_empty else self._sums

    def clear(self) -> None:
        """Forget all that was added; the tensors stay where they are."""
        self._is_empty, self._before = True, None
        if self._sums is not None:
            self._sums.zero_()

    def add(self, values: dict[str, Tensor], counts: dict[str, Tensor | int], *, summed: Collection[str] = ()) -> None:
        """Add one batch.

        Args:
            values: Means over rows, by name.
            counts: Numbers of these rows.
            summed: Names of the values that are sums over them.
        """
        means = torch.stack([value.detach().float() for value in values.values()])
        if self._sums is None or self._sums.device != means.device or self._sums.shape[1] != len(means):
            kept = self.sums
            self._sums = means.new_zeros(2, len(means)) if kept is None else kept.to(means.device)
        self.names, self._is_empty = tuple(values), False
        weights = _weights([counts[name] for name in values], means)
        factors = _weights([1 if name in summed else counts[name] for name in values], means) if summed else weights
        self._sums[0].addcmul_(means, factors)
        self._sums[1].add_(weights)

    def count_replay(self) -> None:
        """Note that the replay of a captured step has added a batch."""
        self._is_empty = False

    def begin_step(self) -> None:
        """Remember the sums, so that :meth:`undo_step` can restore them."""
        self._before = None if self.sums is None else self.sums.clone()

    def undo_step(self, undone: Tensor) -> None:
        """Restore the sums from before the step where ``undone``, a boolean scalar on the device, is true."""
        if self.sums is not None:
            self.sums.copy_(torch.where(undone, self._sums_before(self.sums), self.sums))

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
        self._sums, self._before = (None, None) if state["sums"] is None else state["sums"].clone().unbind()
        self._is_empty = self._sums is None

    def _sums_before(self, sums: Tensor) -> Tensor:
        return torch.zeros_like(sums) if self._before is None else self._before.to(sums.device)


def _weights(counts: list[Tensor | int], like: Tensor) -> Tensor:
    """Return counts as floats on the device; numbers are sent there once, for which later steps do not wait."""
    known = tuple(float(count) for count in counts if not isinstance(count, Tensor))
    if len(known) == len(counts):
        return constant(known, device=like.device)
    scalars = [
        count if isinstance(count, Tensor) else constant((float(count),), device=like.device)[0] for count in counts
    ]
    return torch.stack([scalar.to(like) for scalar in scalars])
