"""The sentences about the speed of a run."""

from time import perf_counter
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils.data import DataLoader

from kd_lightning.callbacks.bottleneck import Advice, describe_bottleneck
from kd_lightning.callbacks.devices import describe_devices, describe_precision, faster_precision
from kd_lightning.callbacks.epoch_metrics import EpochMetrics
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.data.loader import more_workers
from kd_lightning.data.protocol import is_image_data

_SHORT = 2.0
"""Seconds of an epoch that is too short to judge."""


class _Described(Protocol):
    epoch_metrics: EpochMetrics
    compiles: bool

    def describe_speed(self) -> list[str]: ...

    def faster_steps(self) -> list[str]: ...


class SpeedReport(CallbackWithoutIdleHooks):
    """Prints what makes the training fast, and after the first epoch what it spent its time on.

    The modules of this package attach it, and describe their networks in ``describe_speed`` and ``faster_steps``.
    """

    def __init__(self) -> None:
        self._measured = False
        self._first_step_since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the sentence about the networks."""
        self._measured = False
        self._first_step_since = perf_counter()
        networks = cast("_Described", pl_module).describe_speed()
        rank_zero_info(f"Speed: {'; '.join([describe_devices(trainer), describe_precision(trainer), *networks])}.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Print how long the first step took, if networks were compiled in it."""
        since, self._first_step_since = self._first_step_since, None
        if since is not None and cast("_Described", pl_module).compiles:
            rank_zero_info(f"Compiled: the first training step took {perf_counter() - since:.0f} s.")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the sentence about the first epoch, unless it was too short."""
        if self._measured:
            return
        module = cast("_Described", pl_module)
        speed = module.epoch_metrics.speed(trainer)  # on all ranks
        self._measured = speed is not None
        if speed is None or speed.seconds < _SHORT:
            return
        advice = Advice(
            _faster_reading(trainer),
            ["choose a lighter data.augmentation"] if is_image_data(_data(trainer)) else [],
            [*faster_precision(trainer), *module.faster_steps()],
        )
        rank_zero_info(f"Speed: {describe_bottleneck(speed, advice, epoch=trainer.current_epoch)}")


def _data(trainer: pl.Trainer) -> object:
    return trainer.datamodule  # type: ignore[attr-defined]


def _faster_reading(trainer: pl.Trainer) -> list[str]:
    """Return the settings that shorten the waits for images; of a user's own loader the number of workers."""
    data = _data(trainer)
    if is_image_data(data):
        return data.faster_reading()
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    workers = [loader.num_workers for loader in loaders if isinstance(loader, DataLoader)]
    return more_workers("num_workers of the DataLoader", min(workers), trainer.num_devices) if workers else []
