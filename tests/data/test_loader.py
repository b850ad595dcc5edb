"""A loader that resumes within an epoch."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from reading import in_epoch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.data.loader import EpochLoader
from kd_lightning.data.sampler import EpochSampler

COUNT, SIZE = 40, 4
LENGTH = 10


class Indices(Dataset[tuple[int, int]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, int]:
        return index


def identity_collate(indices: list[Any]) -> list[Any]:
    return indices


def make_loader(workers: int = 0, **options: Any) -> EpochLoader:
    sampler = EpochSampler(range(COUNT), batch_size=SIZE, training=True)
    options = {"collate_fn": identity_collate, "num_workers": workers, "persistent_workers": workers > 0, **options}
    return EpochLoader(Indices(), batch_size=SIZE, sampler=sampler, **options)


def batches_of_epoch(loader: EpochLoader, epoch: int) -> list[Any]:
    return list(in_epoch(loader, epoch))


def state_after(loader: EpochLoader, epoch: int, batches: int) -> dict[str, int]:
    iterator = iter(in_epoch(loader, epoch))
    for _ in range(batches):
        next(iterator)
    return loader.state_dict()


workers = pytest.mark.parametrize("workers", [0, 2])


@workers
@pytest.mark.parametrize("taken", [1, 4, 9, 10])
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_an_epoch_resumes_after_the_last_batch_taken(taken: int, workers: int) -> None:
    whole = [batches_of_epoch(make_loader(), epoch) for epoch in range(4)]
    state = state_after(make_loader(workers), 2, taken)
    assert state == {"epoch": 2, "batches": taken}  # without the batches that workers have prefetched
    again = make_loader(workers)
    again.load_state_dict(state)
    for epoch in (2, 3, 1):  # other epochs are complete, whether workers persist or not
        expected = whole[epoch][taken:] if epoch == 2 else whole[epoch]
        assert batches_of_epoch(again, epoch) == expected
        assert again.state_dict() == {"epoch": epoch, "batches": LENGTH}


@workers
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_resumed_epoch_can_be_interrupted_again(workers: int) -> None:
    first, second, third = (make_loader(workers) for _ in range(3))
    second.load_state_dict(state_after(first, 1, 3))
    state = state_after(second, 1, 2)
    assert state == {"epoch": 1, "batches": 5}
    third.load_state_dict(state)
    assert batches_of_epoch(third, 1) == batches_of_epoch(make_loader(), 1)[5:]


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_prefetched_batches_do_not_count() -> None:
    assert state_after(make_loader(2, prefetch_factor=4), 0, 2) == {"epoch": 0, "batches": 2}


def test_the_epoch_is_read_at_the_first_batch() -> None:
    """Lightning makes the iterator before it sets the epoch."""
    loader = make_loader()
    iterator = iter(loader)
    in_epoch(loader, 3)
    assert next(iterator) == batches_of_epoch(make_loader(), 3)[0]
    assert loader.state_dict() == {"epoch": 3, "batches": 1}


def test_the_length_is_that_of_a_full_epoch() -> None:
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "batches": 7})
    assert len(loader) == LENGTH
    assert len(batches_of_epoch(loader, 0)) == 3
    assert len(loader) == LENGTH


def test_an_unused_loader_resumes_at_the_start() -> None:
    assert make_loader().state_dict() == {"epoch": 0, "batches": 0}
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "batches": 0})
    assert batches_of_epoch(loader, 0) == batches_of_epoch(make_loader(), 0)


def linear() -> TeacherModule:
    return TeacherModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def test_lightning_recommends_no_workers_and_the_filters_are_restored(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 8)
    gc.collect()  # loaders of other tests that were never iterated
    before = list(warnings.filters)
    data = DigitsDataModule(batch_size=256)
    make_trainer(limit_train_batches=1).fit(linear(), data)
    make_trainer().test(linear(), data, verbose=False)
    make_trainer().predict(linear(), data)  # for which Lightning builds the loader again
    gc.collect()
    assert list(warnings.filters) == before
    plain = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)), batch_size=4)
    with pytest.warns(PossibleUserWarning, match="does not have many workers"):
        make_trainer().validate(linear(), plain, verbose=False)


def advise() -> None:
    warnings.warn("The 'train_dataloader' does not have many workers", PossibleUserWarning, stacklevel=2)


def test_the_warning_is_filtered_until_a_loader_is_used_or_deleted() -> None:
    gc.collect()
    before = list(warnings.filters)
    used, unused = make_loader(), make_loader()
    advise()
    warnings.filterwarnings("ignore", "a filter that the user adds meanwhile")
    added = warnings.filters[0]
    next(iter(used))
    advise()  # one is left
    del unused
    gc.collect()
    assert list(warnings.filters) == [added, *before]
    with pytest.raises(PossibleUserWarning):
        advise()


def test_a_loader_that_outlives_catch_warnings_removes_no_other_filter() -> None:
    gc.collect()
    with warnings.catch_warnings():
        outliving = make_loader()
    other = make_loader()
    next(iter(outliving))
    advise()
    next(iter(other))
    with pytest.raises(PossibleUserWarning):
        advise()
