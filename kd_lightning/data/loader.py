"""A loader that goes on within an epoch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler

from kd_lightning.data.sampler import EpochSampler


class EpochLoader(DataLoader):
    """A ``DataLoader`` over an :class:`EpochSampler` whose state is the epoch and how many of its batches were taken.

    Lightning keeps the state in checkpoints. An epoch that goes on begins with the first batch that was not taken;
    other epochs are whole. What workers have read ahead does not count. With the sampler that Lightning's
    ``overfit_batches`` puts in, the same batches in each epoch, there is no state.
    """

    sampler: EpochSampler | SequentialSampler
    _taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator: workers begin to read when the first batch is asked for, and by then the epoch is known
        if isinstance(self.sampler, EpochSampler):
            epoch, taken = self.sampler.first
            self._taken = taken if epoch == self.sampler.epoch else 0
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and its batches that were taken."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        return {"epoch": self.sampler.epoch, "batches": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin where a loader was when it gave this state."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.first = state["epoch"], state["batches"]
