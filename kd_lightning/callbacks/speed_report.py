"""The sentence about a run's speed."""

from typing import Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.callbacks.devices import describe_devices, describe_precision


class _Described(Protocol):
    def describe_speed(self) -> list[str]: ...


class SpeedReport(pl.Callback):
    """Prints what makes the training fast, and what else could.

    The modules of this package attach it, and describe their networks in ``describe_speed``.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the sentence."""
        networks = cast("_Described", pl_module).describe_speed()
        rank_zero_info(f"Speed: {'; '.join([describe_devices(trainer), describe_precision(trainer), *networks])}.")
