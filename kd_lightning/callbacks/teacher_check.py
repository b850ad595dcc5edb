"""A check of the teacher before the student learns from it."""

import math
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.callbacks.gather_rows import gather_rows
from kd_lightning.callbacks.label_scores import label_scores, shuffled_map
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.data.batch import images_for_teacher
from kd_lightning.data.labels import check_labels, is_labelled
from kd_lightning.data.loader_checks import flattened
from kd_lightning.data.protocol import is_multi_label
from kd_lightning.data.read_batch import check_channels, read_batch
from kd_lightning.errors import UserError
from kd_lightning.files.progress import progress
from kd_lightning.losses._labels import class_indices
from kd_lightning.networks.data_config import DEFAULT_THRESHOLD
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

    Where an image may have several classes, it is the mean average precision. :class:`DistillationModule` attaches it.

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

        if is_multi_label(trainer.datamodule):  # type: ignore[attr-defined]
            name, measured, (reason, certain) = "map", *_check_several(trainer, classify)
        else:
            correct, count = accuracy_on_val(trainer, classify)
            name, measured = "accuracy", correct / count if count else None
            reason, certain = describe_chance_level(correct, count, module.num_classes or 1) if count else ("", False)
        if measured is None:
            rank_zero_info("There are no labelled validation images to check the teacher on.")
            return
        words = "accuracy" if name == "accuracy" else "mean average precision"
        rank_zero_info(f"The teacher's {words} on the validation images is {measured:.2%}.")
        if trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.log_metrics({f"teacher/{name}": measured}, step=0)
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
    counts = torch.zeros(2, dtype=torch.int64, device=trainer.strategy.root_device)
    for logits, labels in _classified(trainer, classify, multi_label=False):
        classes = class_indices(labels)
        counts += torch.stack([(logits.argmax(1) == classes).sum(), (classes >= 0).sum()])
    correct, count = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return correct, count


def _classified(
    trainer: pl.Trainer, classify: Callable[[Tensor], Tensor], *, multi_label: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and labels of the batches of the validation loaders."""
    loaders = flattened(trainer.val_dataloaders)
    total = sum(count for count in trainer.num_val_batches if math.isfinite(count))
    shown = progress("Checking the teacher", int(total), unit="batches", visible=trainer.is_global_zero)
    with torch.no_grad(), shown as advance:
        for loader, limit in zip(loaders, trainer.num_val_batches, strict=False):
            for index, batch in enumerate(loader):
                if index >= limit:
                    break
                loaded = read_batch(trainer.strategy.batch_to_device(batch), multi_label=multi_label)
                logits = classify(images_for_teacher(loaded))
                check_labels(loaded.labels, num_classes=logits.shape[1], multi_label=multi_label)
                yield logits, loaded.labels
                advance(1)


def _check_several(trainer: pl.Trainer, classify: Callable[[Tensor], Tensor]) -> tuple[float | None, tuple[str, bool]]:
    """Return the mean average precision over all ranks, ``None`` without a labelled image, and its description."""
    parts = [
        (logits[rows].float().cpu(), labels[rows].float().cpu())
        for logits, labels in _classified(trainer, classify, multi_label=True)
        for rows in (is_labelled(labels),)
    ]
    parts = gather_rows(parts, trainer=trainer)
    if not parts:
        return None, ("", False)
    logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    found = (
        label_scores(logits, labels, torch.full(logits.shape[1:], DEFAULT_THRESHOLD)).averages if len(labels) else {}
    )
    if not found:
        return None, ("", False)
    measured = float(found["map"])
    return measured, describe_random_order(measured, shuffled_map(logits, labels), len(labels))


def describe_random_order(measured: float, shuffled: Tensor, count: int) -> tuple[str, bool]:
    """Return why a teacher should not be learned from where images have several classes, and whether that is certain.

    It is not where 97.5% of the random orders reach halfway between chance and 1: the images are too few to decide.

    Args:
        measured: The teacher's mean average precision.
        shuffled: Those of random orders of the images, ``(n,)``.
        count: Number of images.

    Returns:
        The reason, empty where the teacher is better than chance.
    """
    chance, highest = float(shuffled.mean()), float(shuffled.quantile(0.975))
    if measured > highest:
        return "", False
    found = f"The teacher's mean average precision on {count} validation images is {measured:.1%}"
    if highest >= (1 + chance) / 2:
        return f"{found}, too few images to decide whether it is better than a random order ({chance:.1%}).", False
    reason = (
        f"{found}, which is no better than a random order ({chance:.1%}, up to {highest:.1%}); check its weights, the "
        "order of its classes and its input statistics, or set teacher_check='off'."
    )
    return reason, True


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
