"""Loaders of image batches, and one that resumes within an epoch."""

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar
from weakref import finalize

from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch.utils.data import DataLoader, SequentialSampler

from kd_lightning.data.batch import RawBatch
from kd_lightning.data.image_set import PartialBatch, Subset
from kd_lightning.data.sampler import EpochSampler
from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError, describe_unreadable

Fetched = TypeVar("Fetched")


class ImageLoader(DataLoader[RawBatch]):
    """A ``DataLoader`` for which Lightning does not recommend more workers.

    Images in memory are augmented on the device, so there is nothing for workers to do. Lightning checks a loader
    before its first batch and provides no switch, so the warning is filtered until then, or until the loader is
    deleted without having been used.
    """

    left_out: list[UnreadableImageError]
    """The images that the last pass has left out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.left_out = []
        self._stop_ignoring = finalize(self, _remove, _ignore_advice())

    def __iter__(self) -> Iterator[RawBatch]:  # type: ignore[override]
        self._stop_ignoring()  # at most once
        return self._readable(super().__iter__())

    def _readable(self, batches: Iterator[RawBatch | PartialBatch]) -> Iterator[RawBatch]:
        """Raise an error for images that cannot be read, or leave them out and name them in a warning."""
        self.left_out.clear()
        for batch in batches:
            if not isinstance(batch, PartialBatch):
                yield batch
                continue
            message = describe_unreadable(batch.errors, len(batch.errors) + len(batch.batch.ids))
            if not batch.skip_unreadable:
                raise UserError(message)
            self.left_out += batch.errors
            warnings.warn(f"Left out: {message}", stacklevel=2)
            if len(batch.batch.ids):
                yield batch.batch


class EpochLoader(ImageLoader):
    """A loader over an :class:`EpochSampler` whose state is the epoch and the number of its batches that were taken.

    Lightning keeps the state in checkpoints. A resumed epoch begins with the first batch that was not taken; other
    epochs are complete. Batches that workers have read ahead do not count. With the sampler that Lightning inserts for
    ``overfit_batches``, the same batches in each epoch, there is no state.
    """

    sampler: EpochSampler | SequentialSampler
    _taken = 0

    def __iter__(self) -> Iterator[RawBatch]:  # type: ignore[override]
        # a generator: workers begin to read when the first batch is requested, and by then the epoch is known
        if isinstance(self.sampler, EpochSampler):
            epoch, taken = self.sampler.first
            self._taken = taken if epoch == self.sampler.epoch else 0
        for batch in self._on_device() or super().__iter__():
            self._taken += 1
            yield batch

    def _on_device(self) -> Iterator[RawBatch] | None:
        """Return the batches as parts of an epoch that was copied to the device, if the images are kept there."""
        if not isinstance(self.sampler, EpochSampler) or self.num_workers or not isinstance(self.dataset, Subset):
            return None
        epoch = self.dataset.placed(self.sampler.positions(), self.sampler.epoch)
        if epoch is None:
            return None
        self._stop_ignoring()
        starts = range(0, len(epoch.ids), self.sampler.batch_size)
        return (epoch.between(start, start + self.sampler.batch_size) for start in starts)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and the number of its batches that were taken."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        return {"epoch": self.sampler.epoch, "batches": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the loader of this state was."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.first = state["epoch"], state["batches"]


def more_workers(setting: str, now: int, processes: int = 1) -> list[str]:
    """Return the advice to raise a number of workers, unless there are as many as cores.

    Args:
        setting: Name of the setting.
        now: Workers of each process.
        processes: Processes of this node that train.

    Example:
        >>> more_workers("data.num_workers", now=10_000)
        []
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if now * processes >= cores:
        return []
    shared = f" for {processes} processes" if processes > 1 else ""
    return [f"raise {setting} ({now} now, {cores} core{'s' * (cores > 1)}{shared})"]


def as_fetched(batch: Fetched) -> Fetched:
    """Return a batch that its data set has put together, in place of collating samples."""
    return batch


_Filter = tuple[str, re.Pattern[str], type[Warning], None, int]


def _ignore_advice() -> _Filter:
    """Add a filter of its own for one loader, in the form in which the module ``warnings`` keeps filters."""
    entry = ("ignore", re.compile(r"The '\w+' does not have many workers"), PossibleUserWarning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]  # filterwarnings() merges equal filters
    return entry


def _remove(entry: _Filter) -> None:
    """Remove this very filter, unless the block of ``catch_warnings`` that it was added in has ended."""
    warnings.filters[:] = [kept for kept in warnings.filters if kept is not entry]  # type: ignore[index]
