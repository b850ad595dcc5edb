"""Training metrics of an epoch: means of the loss and its terms, images per second, and how long it waited for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from kd_lightning.callbacks.bottleneck import Speed
from kd_lightning.callbacks.fetch_timer import attach_timer, detach_timer, timer_of
from kd_lightning.callbacks.rank_state import gather_ranks, select_rank
from kd_lightning.callbacks.running_means import MeansState, RunningMeans
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.errors import UserError
from kd_lightning.losses._labels import class_indices


class _State(MeansState):
    """The sums of all ranks, ``(ranks, 2, 2, names)``, and the time of the epoch."""

    seconds: float
    waiting: float


class _Moment(NamedTuple):
    """The sums at the end of the first step of an epoch."""

    sums: Tensor
    seconds: float
    preparing: float


class EpochMetrics(CallbackWithoutIdleHooks):
    """Averages what a module logs in each step over the epoch and all ranks, and measures how fast they were.

    ``train/images_per_second`` counts the images of all ranks, ``train/waiting_for_data`` is the share of the time in
    which the device had nothing to do because the next batch was not there. Nothing waits for the device to measure
    them: the sums stay there and are read once an epoch. Time spent on validation or in :meth:`paused` is not counted.
    The modules of this package own one and attach it; its state is saved within an epoch, so that a resumed
    epoch logs the same values.
    """

    def __init__(self) -> None:
        self.means = RunningMeans()
        self.seconds = 0.0
        self._started = 0.0
        self._loaded: _State | None = None
        self._first_step: _Moment | None = None

    def add(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        logits: Tensor,
        labels: Tensor | None = None,
        *,
        all_labelled: bool = False,
    ) -> None:
        """Add a batch.

        Args:
            loss: The loss, a scalar.
            terms: Further scalars to average.
            logits: Output of the trained network, ``(B, C)``.
            labels: Class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``; without them there
                is no accuracy, as of several classes an image.
            all_labelled: Whether every row is known to be labelled.
        """
        with torch.no_grad():
            if labels is None:
                values = {"loss": loss, **terms}
                self.means.add(values, dict.fromkeys(values, len(logits)))
                return
            classes = class_indices(labels)
            correct = (logits.argmax(1) == classes).sum(dtype=torch.float32)
            labelled = len(logits) if all_labelled else (classes >= 0).sum(dtype=torch.float32)
            values = {"loss": loss, "accuracy": correct, **terms}
            counts = {**dict.fromkeys(values, len(logits)), "accuracy": labelled}
            self.means.add(values, counts, summed=("accuracy",))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what runs inside out of the images per second."""
        started = perf_counter()
        yield
        self._started += perf_counter() - started

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and continue a loaded epoch."""
        self._started = perf_counter()
        self._first_step = None
        if not trainer.barebones:
            attach_timer(trainer)
        state, self._loaded = self._loaded, None
        if state is not None and state["sums"] is not None:
            self.seconds = state["seconds"]
            if (timer := timer_of(trainer)) is not None:
                timer.restart(state.get("waiting", 0.0))
            sums = select_rank(state["sums"], trainer, pl_module.device)
            self.means.load_state_dict({"names": state["names"], "sums": sums})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the sums and the clock."""
        self.means.clear()
        self.seconds, self._started = 0.0, perf_counter()
        self._first_step = None
        if (timer := timer_of(trainer)) is not None:
            timer.restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Add the time since the last batch."""
        now = perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now
        if self._first_step is None and self.means.sums is not None and (timer := timer_of(trainer)) is not None:
            self._first_step = _Moment(self.means.sums.clone(), self.seconds, timer.preparing)

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
            if (timer := timer_of(trainer)) is not None:
                metrics["waiting_for_data"] = torch.tensor(min(1.0, timer.waiting(wait=True) / self.seconds))
        for name, value in metrics.items():
            pl_module.log(f"train/{name}", value, prog_bar=name == "accuracy", sync_dist=True)

    def speed(self, trainer: pl.Trainer) -> Speed | None:
        """Return the speed of the epoch without its first step, in which networks are compiled; call it on all ranks.

        Returns:
            ``None`` if there is no other step, or nothing was measured.
        """
        timer, first, sums = timer_of(trainer), self._first_step, self.means.sums
        if timer is None or first is None or sums is None or self.seconds == first.seconds:
            return None
        waiting = timer.waiting(wait=True) - timer.waiting_for_first
        own = torch.tensor([self.seconds - first.seconds, waiting, timer.preparing - first.preparing])
        mine = torch.cat([(sums - first.sums)[1, :1], own.to(sums)])
        total = trainer.strategy.reduce(mine, reduce_op="sum")
        assert isinstance(total, Tensor)
        images, seconds, waiting, preparing = total.tolist()
        return Speed(
            images * trainer.world_size / seconds,
            seconds / trainer.world_size,
            min(1.0, waiting / seconds),
            min(1.0, preparing / seconds),
        )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop measuring."""
        detach_timer(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the sums of all ranks (which save at the same step)."""
        state = self.means.state_dict()
        sums = None if state["sums"] is None else gather_ranks(state["sums"], trainer)
        timer = timer_of(trainer)
        waiting = 0.0 if timer is None else timer.waiting()
        saved: _State = {"names": state["names"], "sums": sums, "seconds": self.seconds, "waiting": waiting}
        checkpoint["epoch_metrics"] = saved

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the saved sums until training starts."""
        self._loaded = checkpoint.get("epoch_metrics") if trainer.state.fn == "fit" else None
