"""The type of floats that the Trainer's precision asks for."""

from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from kd_lightning.data.batch import Batch


def to_trainer_precision(batch: Batch, trainer: pl.Trainer | None) -> Batch:
    """Convert a batch as the Trainer's precision does, for example to bfloat16 under ``bf16-true``.

    Lightning converts a batch before ``on_after_batch_transfer``, when its images are still bytes.

    Args:
        batch: A batch on its device.
        trainer: The Trainer; without one nothing is converted.
    """
    if trainer is None or type(trainer.precision_plugin) in (Precision, MixedPrecision):  # which ask for float32
        return batch
    return cast("Batch", trainer.precision_plugin.convert_input(batch))
