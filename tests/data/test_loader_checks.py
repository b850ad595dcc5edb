from typing import Any

import pytest
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning.data.loader_checks import check_not_empty, check_repeatable, flattened, last_batch_size
from kd_lightning.errors import UserError


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(9))


def loader(count: int = 9, **options: Any) -> DataLoader:
    return DataLoader(list(range(count)), **{"batch_size": 4, **options})  # type: ignore[arg-type]


FULL, EMPTY, STREAM = loader(), loader(0), DataLoader(Stream(), batch_size=4)


@pytest.mark.parametrize("loaders", [FULL, STREAM, [FULL, FULL], {"a": FULL}, CombinedLoader([FULL], "sequential")])
def test_loaders_that_yield_something_or_may(loaders: Any) -> None:
    check_not_empty(loaders, "test")
    check_repeatable(loaders, "test")


@pytest.mark.parametrize("loaders", [EMPTY, [], None, [FULL, EMPTY], {"a": EMPTY}, loader(3, drop_last=True)])
def test_empty_loaders_are_refused(loaders: Any) -> None:
    with pytest.raises(UserError, match="The test loader yields no batch; "):
        check_not_empty(loaders, "test")


def test_a_generator_is_refused_where_it_is_read_twice() -> None:
    with pytest.raises(UserError, match="The training loader is a generator, which can be read only once"):
        check_repeatable((batch for batch in FULL), "training")


@pytest.mark.parametrize(
    ("one", "size"),
    [
        (FULL, 1),
        (loader(8), 4),
        (loader(10), 2),
        (loader(drop_last=True), 4),
        (loader(sampler=range(7)), 3),
        (STREAM, None),
        (loader(batch_size=None), None),
        (loader(batch_size=1, batch_sampler=[[0, 1], [2]]), None),
    ],
)
def test_the_size_of_the_last_batch(one: DataLoader, size: int | None) -> None:
    assert last_batch_size(one) == size


def test_no_loaders_at_all() -> None:
    assert flattened(None) == []
