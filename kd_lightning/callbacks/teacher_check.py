"""A check of the teacher before the student learns from it."""

import math
from collections.abc import Callable
from typing import Literal, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.data.batch import images_for_teacher
from kd_lightning.data.labels import check_labels
from kd_lightning.data.loader_checks import flattened
from kd_lightning.data.read_batch import check_channels, read_batch
from kd_lightning.errors import UserError
from kd_lightning.files.progress import progress
from kd_lightning.losses._labels import class_indices
from kd_lightning.teacher.frozen_teacher import FrozenTeacher


class _Distillation(Protocol):
    """The parts of a :class:`DistillationModule` that are read."""

    frozen_teacher: FrozenTeacher | None
    num_classes: int | None
    image_shape: tuple[int, ...] | None

    @property
    def shares_classes(self) -> bool: ...


class TeacherCheck(CallbackWithoutIdleHooks):
    """Measures the teacher's accuracy on the validation images before the first step.

    :class:`DistillationModule` attaches it.

    Args:
        mode: Reaction to a teacher that is no better than chance: ``"error"``, ``"warn"``, or ``"off"`` to leave out
            the check.
    """

    def __init__(self, mode: Literal["error", "warn", "off"]) -> None:
        self.mode = mode

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the teacher, unless the run is resumed.

        Raises:
            UserError: If the teacher is no better than chance and the mode is ``"error"``.
        """
        module = cast("_Distillation", pl_module)
        teacher = module.frozen_teacher
        if self.mode == "off" or trainer.global_step > 0 or teacher is None:
            return
        if not module.shares_classes:
            rank_zero_info("The teacher has other classes than the data, so its accuracy is not measured.")
            return

        def classify(images: Tensor) -> Tensor:
            check_channels(images, module.image_shape)
            return teacher(images).logits

        correct, count = accuracy_on_val(trainer, classify)
        if not count:
            rank_zero_info("There are no labelled validation images to check the teacher on.")
            return
        rank_zero_info(f"The teacher's accuracy on the validation images is {correct / count:.2%}.")
        if trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.log_metrics({"teacher/accuracy": correct / count}, step=0)
        reason, certain = describe_chance_level(correct, count, module.num_classes or 1)
        if certain and self.mode == "error":
            raise UserError(reason)
        if reason:
            rank_zero_warn(reason)


def accuracy_on_val(trainer: pl.Trainer, classify: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Return the correctly classified and the labelled images of the validation loaders, summed over all ranks.

    Args:
        trainer: Trainer that is about to fit.
        classify: Function from images to logits, called without gradient.
    """
    loaders = flattened(trainer.val_dataloaders)
    total = sum(count for count in trainer.num_val_batches if math.isfinite(count))
    counts = torch.zeros(2, dtype=torch.int64, device=trainer.strategy.root_device)
    shown = progress("Checking the teacher", int(total), unit="batches", visible=trainer.is_global_zero)
    with torch.no_grad(), shown as advance:
        for loader, limit in zip(loaders, trainer.num_val_batches, strict=False):
            for index, batch in enumerate(loader):
                if index >= limit:
                    break
                loaded = read_batch(trainer.strategy.batch_to_device(batch))
                logits = classify(images_for_teacher(loaded))
                check_labels(loaded.labels, num_classes=logits.shape[1])
                classes = class_indices(loaded.labels)
                counts += torch.stack([(logits.argmax(1) == classes).sum(), (classes >= 0).sum()])
                advance(1)
    correct, count = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return correct, count


def describe_chance_level(correct: int, count: int, num_classes: int) -> tuple[str, bool]:
    """Return why a teacher should not be learned from, and whether that is certain.

    It is not where the 95% interval of the accuracy reaches from chance to halfway between chance and 1: the images are
    too few to decide.

    Args:
        correct: Number of images that the teacher classifies correctly.
        count: Number of images.
        num_classes: Number of classes.

    Returns:
        The reason, empty where the teacher is better than chance.
    """
    from scipy.stats import binomtest  # slow to import

    interval, chance = binomtest(correct, count).proportion_ci(method="wilson"), 1 / num_classes
    if interval.low > chance:
        return "", False
    found = f"The teacher classifies {correct} of {count} validation images correctly"
    if interval.high >= (1 + chance) / 2:
        return f"{found}, too few images to decide whether it is better than chance ({chance:.1%}).", False
    bounds = f"{interval.low:.1%} to {interval.high:.1%}"
    reason = (
        f"{found} ({bounds}), which is no better than chance ({chance:.1%}); check its weights, the order of its "
        "classes and its input statistics, or set teacher_check='off'."
    )
    return reason, True
