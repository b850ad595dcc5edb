"""Progress in lines, for output that goes to a file, where a bar would leave nothing until the end."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from math import isfinite
from time import monotonic
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from kd_lightning.files.progress import DELAY, describe_duration, progress


class LineProgress(ProgressBar):
    """Prints a line every ten per cent of a training, with the time that is left and the last validation accuracy.

    Tests, validations and predictions of more than two seconds print lines too. The command line uses it in place of
    Lightning's bar where its output is not a terminal.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LineProgress()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._done = self._shown = self._at_start = 0
        self._started = 0.0
        self._advance: Callable[[int], None] = lambda count: None
        self._evaluation = ExitStack()

    def disable(self) -> None:
        """Do nothing: only the first process prints."""

    def enable(self) -> None:
        """Do nothing, as :meth:`disable` does."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        total = _total_batches(trainer)
        self._at_start = self._done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._started = monotonic()
        self._shown = 10 * self._done // total if total else 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is due."""
        self._done += 1
        total, seconds = _total_batches(trainer), monotonic() - self._started
        tenths = 10 * self._done // total if total else 0
        if trainer.is_global_zero and seconds > DELAY and self._shown < tenths < 10:
            self._shown = tenths
            left = seconds * (total - self._done) / (self._done - self._at_start)
            print(
                f"Training: {10 * tenths} %, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, "
                f"{describe_duration(left)} left{_accuracy(trainer)}",
                file=sys.stderr,
                flush=True,
            )

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the lines of a test."""
        self._start("Testing", trainer, trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any, **options: Any) -> None:
        """Print a line if it is due."""
        self._advance(1)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the lines."""
        self._evaluation.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the lines of a validation that is not part of a training."""
        if trainer.state.fn == "validate":
            self._start("Validating", trainer, trainer.num_val_batches)

    def on_validation_batch_end(self, *args: Any, **options: Any) -> None:
        """Print a line if it is due."""
        self._advance(1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the lines."""
        self._evaluation.close()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the lines of a prediction."""
        self._start("Predicting", trainer, trainer.num_predict_batches)

    def on_predict_batch_end(self, *args: Any, **options: Any) -> None:
        """Print a line if it is due."""
        self._advance(1)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the lines."""
        self._evaluation.close()

    def _start(self, title: str, trainer: pl.Trainer, batches: list[int | float]) -> None:
        total = sum(batches)
        visible = trainer.is_global_zero and isfinite(total)
        self._evaluation = ExitStack()
        shown = progress(title, int(total) if visible else 0, unit="batches", visible=visible)
        self._advance = self._evaluation.enter_context(shown)


def _total_batches(trainer: pl.Trainer) -> int:
    """Return the batches of all epochs, 0 where the length of the training is not known."""
    total = trainer.num_training_batches * (trainer.max_epochs or 0)
    return int(total) if isfinite(total) and total > 0 else 0


def _accuracy(trainer: pl.Trainer) -> str:
    for name in ("val/accuracy", "val/map"):
        if (value := trainer.callback_metrics.get(name)) is not None:
            return f", {name} {float(value):.4f}"
    return ""
