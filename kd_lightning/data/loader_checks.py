"""Checks of loaders before they are read."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning.errors import UserError


def check_not_empty(loaders: Any, name: str) -> None:
    """Check that loaders yield batches, where they have a length.

    Args:
        loaders: A loader or several, as a Trainer takes them.
        name: Name of the loaders for the message, for example ``"test"``.

    Raises:
        UserError: If there is no loader, or one is empty.
    """
    each = flattened(loaders)
    if not each or any(_length(loader) == 0 for loader in each):
        raise UserError(
            f"The {name} loader yields no batch; give it a data set that is not empty, and with drop_last one of at "
            "least batch_size images."
        )


def check_repeatable(loaders: Any, name: str) -> None:
    """Check that loaders can be read more than once, as a fit reads them.

    Args:
        loaders: A loader or several, as a Trainer takes them.
        name: Name of the loaders for the message, for example ``"validation"``.

    Raises:
        UserError: If one is a generator, or another iterator.
    """
    for loader in flattened(loaders):
        if isinstance(loader, Iterator):
            raise UserError(
                f"The {name} loader is a {type(loader).__name__}, which can be read only once; give a DataLoader, for "
                "example of an IterableDataset."
            )


def flattened(loaders: Any) -> list[Any]:
    """Return the loaders in what a Trainer takes: a loader, a list or dict of them, or ``None``."""
    if loaders is None:
        return []
    return (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")).flattened


def last_batch_size(loader: DataLoader[Any]) -> int | None:
    """Return the number of samples in the last batch of a loader, ``None`` where it is not known.

    Example:
        >>> last_batch_size(DataLoader(range(9), batch_size=4)), last_batch_size(DataLoader(range(8), batch_size=4))
        (1, 4)
    """
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        return None
    rest = len(loader.sampler) % loader.batch_size  # type: ignore[arg-type]
    return loader.batch_size if loader.drop_last or not rest else rest


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # of an IterableDataset without a length
        return None
