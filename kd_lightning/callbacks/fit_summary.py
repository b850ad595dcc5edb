"""Writes what a training has reached and cost beside the run."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning.callbacks.epoch_metrics import EpochMetrics
from kd_lightning.callbacks.fetch_timer import timer_of
from kd_lightning.callbacks.run_cost import RunCost
from kd_lightning.files.atomic import atomic_write


class FitSummary(pl.Callback):
    """Writes ``fit.json`` into the folder of a run after each epoch, and when the training ends or is interrupted.

    It holds the validation metrics of the best epoch, the epochs and steps so far, the time and what it was spent on,
    and the files of the teachers with their digests. A resumed run continues it.

    Args:
        teachers: Path, digest (``sha256``) and size (``bytes``) of each file that a teacher was loaded from.
        images: Path of the folder of images, with digests of what is in it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FitSummary()], accelerator="cpu", logger=False)
    """

    def __init__(self, teachers: Sequence[Mapping[str, Any]] = (), images: Mapping[str, Any] | None = None) -> None:
        self.teachers = list(teachers)
        self.images = images
        self.cost = RunCost()
        self._before = RunCost()
        self._training = 0.0
        self._is_first = True
        self._started = 0.0
        self._begun = ""
        self._file: Path | None = None
        self._val: dict[str, float] = {}
        self._score: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; continue the file of a run that is resumed."""
        folder = trainer.log_dir  # on all ranks, since Lightning broadcasts it
        self._file = Path(folder, "fit.json") if folder is not None and trainer.is_global_zero else None
        self._before, self._val, self._score, self._training, self._is_first = RunCost(), {}, None, 0.0, True
        self._started, self._begun = perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        if self._file is not None and trainer.global_step > 0:
            self._continue(self._file)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave out the part of a resumed epoch that the file counts already."""
        if self._is_first:
            self._training, self._is_first = -_epoch_seconds(pl_module), False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        self._training += _epoch_seconds(pl_module)
        if self._is_best(trainer):
            self._val = {
                name.removeprefix("val/"): round(float(value), 6)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
        self._measure(trainer)
        self._write(trainer, finished=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file of a training that has ended."""
        self._measure(trainer)
        self._write(trainer, finished=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the file of a training that was interrupted."""
        if self._started:
            self._training += _epoch_seconds(pl_module)
            self._measure(trainer)
            with suppress(OSError):  # the disk may be what was full
                self._write(trainer, finished=False)

    def _is_best(self, trainer: pl.Trainer) -> bool:
        """Return whether an epoch is better than those before; the checkpoint callback decides it after this one."""
        checkpoint = _best_checkpoint(trainer)
        if checkpoint is None or checkpoint.monitor not in trainer.callback_metrics:
            return True
        score = float(trainer.callback_metrics[checkpoint.monitor])
        if self._score is not None and (score <= self._score if checkpoint.mode == "max" else score >= self._score):
            return False
        self._score = score
        return True

    def _measure(self, trainer: pl.Trainer) -> None:
        timer = timer_of(trainer)
        waiting, teacher, caching = (0.0, 0.0, 0.0) if timer is None else timer.totals()
        now = RunCost(perf_counter() - self._started, self._training, waiting, teacher, caching)
        self.cost = RunCost(*(before + here for before, here in zip(self._before, now, strict=True)))

    def _continue(self, file: Path) -> None:
        with suppress(OSError, ValueError, TypeError, AttributeError):  # the file of a run that was cut
            saved = json.loads(file.read_text())
            self._before = RunCost(**saved["cost"])
            self._val, self._score, self._begun = saved["val"], saved["score"], saved["begun"]

    def _write(self, trainer: pl.Trainer, *, finished: bool) -> None:
        if self._file is None:
            return
        checkpoint = _best_checkpoint(trainer)
        content = {
            "finished": finished,
            "begun": self._begun,
            "epochs": trainer.current_epoch + (0 if finished else 1),
            "planned_epochs": trainer.max_epochs,
            "steps": trainer.global_step,
            "monitor": None if checkpoint is None else checkpoint.monitor,
            "score": self._score,
            "val": self._val,
            "device": _device_name(trainer.strategy.root_device, trainer.world_size),
            "cost": {name: round(value, 3) for name, value in self.cost._asdict().items()},
            "teachers": self.teachers,
            "images": self.images,
        }
        with atomic_write(self._file) as file:
            file.write(f"{json.dumps(content, indent=2)}\n".encode())


def _epoch_seconds(pl_module: pl.LightningModule) -> float:
    metrics = getattr(pl_module, "epoch_metrics", None)
    return metrics.seconds if isinstance(metrics, EpochMetrics) else 0.0


def _best_checkpoint(trainer: pl.Trainer) -> ModelCheckpoint | None:
    found = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None)
    return next(found, None)


def _device_name(device: torch.device, count: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{count} x {name}" if count > 1 else name
