"""Measures how much of the way from the student alone to its teacher distillation goes."""

from pathlib import Path
from typing import Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.callbacks.teacher_check import accuracy_on_val
from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.data.protocol import is_multi_label
from kd_lightning.errors import UserError
from kd_lightning.teacher.frozen_teacher import FrozenTeacher


class _Distillation(Protocol):
    """The parts of a :class:`DistillationModule` that are read."""

    frozen_teacher: FrozenTeacher | None

    @property
    def shares_classes(self) -> bool: ...


class GapClosed(CallbackWithoutIdleHooks):
    """Logs ``val/gap_closed`` in each epoch: 0 is the same student trained without a teacher, 1 the teacher.

        (student - alone) / (teacher - alone)

    in accuracies on the validation images, of which the teacher's is measured before the first step.

    Args:
        alone: Accuracy in [0, 1] of the student without a teacher on the same validation images, or the checkpoint of
            its best epoch.

    Raises:
        UserError: If an accuracy is outside [0, 1]; before the first step if the checkpoint does not contain one, or
            the module has no teacher for these classes.

    Example:
        >>> GapClosed(0.8).part(student=0.95, teacher=1.0)
        0.75
    """

    def __init__(self, alone: float | str) -> None:
        if not isinstance(alone, str) and not 0 <= alone <= 1:
            raise UserError(f"alone must be an accuracy in [0, 1], or a checkpoint, got {alone}.")
        self.alone = alone
        self._teacher: float | None = None
        self._accuracy = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the accuracy of the student alone."""
        if stage != "fit":
            return
        if getattr(pl_module, "frozen_teacher", None) is None:
            raise UserError(f"GapClosed compares with a teacher, but {type(pl_module).__name__} has none; remove it.")
        if is_multi_label(trainer.datamodule):  # type: ignore[attr-defined]
            raise UserError("GapClosed compares accuracies, but an image may have several classes; remove it.")
        self._accuracy = best_val_accuracy(self.alone) if isinstance(self.alone, str) else self.alone

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the teacher."""
        self._teacher = None
        module = cast("_Distillation", pl_module)
        teacher = module.frozen_teacher
        if teacher is None or not module.shares_classes:
            raise UserError("GapClosed compares accuracies, but the teacher has other classes; remove it.")

        def classify(images: Tensor) -> Tensor:
            return teacher(images).logits

        correct, count = accuracy_on_val(trainer, classify)
        measured = correct / count if count else 0.0
        if measured <= self._accuracy:
            rank_zero_warn(
                f"val/gap_closed is not logged: the teacher's accuracy on the validation images, {measured:.2%}, is "
                f"not above that of the student alone, {self._accuracy:.2%}."
            )
            return
        self._teacher = measured
        rank_zero_info(
            f"The gap on the validation images: {self._accuracy:.2%} without a teacher, {measured:.2%} the teacher."
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the part of the gap."""
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if self._teacher is None or accuracy is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        part = {"val/gap_closed": self.part(student=float(accuracy), teacher=self._teacher)}
        for logger in trainer.loggers:
            logger.log_metrics(part, step=trainer.global_step)

    def part(self, *, student: float, teacher: float) -> float:
        """Return the part of the gap that a student with an accuracy closes."""
        alone = self._accuracy if isinstance(self.alone, str) else self.alone
        return round((student - alone) / (teacher - alone), 6)


def best_val_accuracy(path: str) -> float:
    """Return the accuracy of the best epoch of a checkpoint's run, as its ``ModelCheckpoint`` has kept it."""
    if Path(path).expanduser().is_dir():
        raise UserError(f"{path!r} is a folder; name the checkpoint of the student alone, or its accuracy.")
    for state in Checkpoint(path).content.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("monitor") == "val/accuracy":
            score = state.get("best_model_score")
            if score is not None:
                return float(score)
    raise UserError(
        f"{path!r} does not contain the accuracy of its best epoch, since nothing monitored val/accuracy; give the "
        "accuracy itself."
    )
