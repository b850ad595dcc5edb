"""Advice where a device has no memory left."""

from typing import Any

import lightning.pytorch as pl
import torch


class OutOfMemoryAdvice(pl.Callback):
    """Adds a note to the error that a full memory raises, which says what makes a run smaller.

    The modules of this package attach it. Python prints the note below the error; ``kd-lightning`` prints it alone.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Add the note."""
        if not is_out_of_memory(exception):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        size = getattr(data, "batch_size", None)
        exception.add_note(
            f"The memory of {trainer.strategy.root_device} is full; lower batch_size"
            f"{'' if size is None else f' ({size} now)'} and raise accumulate_grad_batches to keep as many images in a "
            "step of the optimizer, use smaller images, or set precision='bf16-mixed'."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU or the CPU has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
