"""Reading a data module as a trainer does: the stored splits, and the loaders of a rank and an epoch."""

from types import SimpleNamespace
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from kd_lightning.data.image_set import ImageSet, StreamedImages
from kd_lightning.data.sampler import EpochSampler

DataModule = TypeVar("DataModule", bound=pl.LightningDataModule)
Loader = TypeVar("Loader", bound=DataLoader[Any])


def in_memory(images: ImageSet | StreamedImages | None) -> ImageSet:
    """Return a stored split, and fail if it does not exist or is not in memory."""
    assert isinstance(images, ImageSet)
    return images


def on_rank(data: DataModule, world_size: int, rank: int) -> DataModule:
    """Return a data module after giving it what it asks of the trainer of a rank."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(world_size=world_size, global_rank=rank, strategy=strategy)
    data.trainer = cast("pl.Trainer", trainer)
    return data


def in_epoch(loader: Loader, epoch: int) -> Loader:
    """Return a loader after setting its epoch."""
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    return loader
