"""Advice where a device has no memory left."""

import lightning.pytorch as pl
import torch

from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.errors import add_user_message


class OutOfMemoryAdvice(CallbackWithoutIdleHooks):
    """Attaches to an out-of-memory error a sentence about what makes a run smaller.

    The modules of this package attach it. Python prints it below the traceback, ``kd-lightning`` instead of it.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Add the note."""
        if not is_out_of_memory(exception):
            return
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        size = getattr(data, "batch_size", None)
        add_user_message(
            exception,
            f"The memory of {trainer.strategy.root_device} is full; lower batch_size"
            f"{'' if size is None else f' ({size} now)'} and raise accumulate_grad_batches to keep as many images in a "
            "step of the optimizer, use smaller images, or set precision='bf16-mixed'.",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU or the CPU has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
