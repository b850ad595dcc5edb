"""``Trainer.fit`` for benchmarks: without output, and a given number of steps at a time."""

import logging
import threading
from typing import Any

import lightning.pytorch as pl
import torch


def quiet_trainer(device: str, *callbacks: pl.Callback, max_epochs: int) -> pl.Trainer:
    """Return a trainer in bfloat16 mixed precision that prints, writes and validates nothing."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return pl.Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed",
        max_epochs=max_epochs,
        limit_val_batches=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class StepwiseFit(pl.Callback):
    """A running ``Trainer.fit`` that pauses until it is called with a number of training steps.

    Several of them can alternate: each runs in a thread of its own, and only one thread runs at a time.

    Args:
        module: Module to train.
        data: Data module.
        device: Accelerator of the trainer.
        callbacks: Further callbacks.
    """

    def __init__(
        self, module: pl.LightningModule, data: pl.LightningDataModule, device: str, *callbacks: pl.Callback
    ) -> None:
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._steps_left = 0
        self._error: BaseException | None = None
        trainer = quiet_trainer(device, self, *callbacks, max_epochs=-1)
        threading.Thread(target=self._fit, args=(trainer, module, data), daemon=True).start()
        self._wait()  # torch.fx changes nn.Module while it traces a teacher: one setup at a time

    def __call__(self, steps: int) -> None:
        """Take some training steps.

        Raises:
            RuntimeError: If the fit ended with an error.
        """
        self._steps_left = steps
        self._resume.release()
        self._wait()

    def _wait(self) -> None:
        self._paused.acquire()
        if self._error is not None:
            raise RuntimeError("Trainer.fit failed.") from self._error

    def _fit(self, trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        try:
            trainer.fit(module, data)
        except BaseException as error:  # raised in the thread that waits
            self._error = error
        self._paused.release()

    def _pause(self) -> None:
        self._paused.release()
        self._resume.acquire()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause before the first step."""
        torch.set_num_threads(1)  # a setting of each thread in OpenMP
        self._pause()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Pause after the last of the steps."""
        self._steps_left -= 1
        if not self._steps_left:
            self._pause()
