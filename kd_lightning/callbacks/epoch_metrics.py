"""Training metrics of an epoch: means of the loss and its terms, and images per second."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from kd_lightning.callbacks.rank_state import gather_ranks, select_rank
from kd_lightning.callbacks.running_means import MeansState, RunningMeans
from kd_lightning.errors import UserError
from kd_lightning.losses._labels import class_indices


class _State(MeansState):
    """The sums of all ranks, ``(ranks, 2, 2, names)``, and the time of the epoch."""

    seconds: float


class EpochMetrics(pl.Callback):
    """Averages what a module logs in each step over the epoch and all ranks, and measures images per second.

    The sums stay on the device and are read once an epoch. Time spent on validation or in :meth:`paused` is not
    counted. The modules of this package own one and attach it; its state is saved within an epoch, so that a resumed
    epoch logs the same values.
    """

    def __init__(self) -> None:
        self.means = RunningMeans()
        self.seconds = 0.0
        self._started = 0.0
        self._loaded: _State | None = None

    def add(self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: The loss, a scalar.
            terms: Further scalars to average.
            logits: Output of the trained network, ``(B, C)``.
            labels: Class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``.
        """
        with torch.no_grad():
            classes = class_indices(labels)
            labelled = (classes >= 0).sum()
            accuracy = (logits.argmax(1) == classes).sum() / labelled.clamp(min=1)
            values = {"loss": loss, "accuracy": accuracy, **terms}
            self.means.add(values, {**dict.fromkeys(values, len(logits)), "accuracy": labelled})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what runs inside out of the images per second."""
        started = perf_counter()
        yield
        self._started += perf_counter() - started

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and continue a loaded epoch."""
        self._started = perf_counter()
        state, self._loaded = self._loaded, None
        if state is not None and state["sums"] is not None:
            self.seconds = state["seconds"]
            sums = select_rank(state["sums"], trainer, pl_module.device)
            self.means.load_state_dict({"names": state["names"], "sums": sums})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the sums and the clock."""
        self.means, self.seconds, self._started = RunningMeans(), 0.0, perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Add the time since the last batch."""
        now = perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock."""
        self._started = perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means over the epoch and all ranks, and the images per second.

        Raises:
            UserError: If every step of the epoch was skipped.
        """
        if self.means.sums is None:
            return
        total = trainer.strategy.reduce(self.means.sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        if not total[1, 0]:  # the number of images
            raise UserError(
                f"No step of epoch {trainer.current_epoch} was finite; check the images and the teacher, or lower "
                "learning_rate."
            )
        metrics = self.means.compute(total)
        if self.seconds:
            metrics["images_per_second"] = total[1, 0] / self.seconds
        for name, value in metrics.items():
            pl_module.log(f"train/{name}", value, prog_bar=name == "accuracy", sync_dist=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the sums of all ranks (which save at the same step)."""
        state = self.means.state_dict()
        sums = None if state["sums"] is None else gather_ranks(state["sums"], trainer)
        saved: _State = {"names": state["names"], "sums": sums, "seconds": self.seconds}
        checkpoint["epoch_metrics"] = saved

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the saved sums until training starts."""
        self._loaded = checkpoint.get("epoch_metrics") if trainer.state.fn == "fit" else None
