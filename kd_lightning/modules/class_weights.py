"""Weights of the classes in a loss on labels."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kd_lightning.data.labels import is_labelled
from kd_lightning.data.protocol import is_image_data
from kd_lightning.errors import UserError

ClassWeights = Literal["balanced"] | list[float] | None


def check_class_weights(class_weights: ClassWeights) -> None:
    """Make sure that weights are numbers >= 0.

    Raises:
        UserError: If they are not.
    """
    if class_weights in (None, "balanced"):
        return
    numbers = isinstance(class_weights, Sequence) and not isinstance(class_weights, str)
    if not numbers or not all(weight >= 0 for weight in class_weights) or not sum(class_weights) > 0:  # type: ignore
        raise UserError(
            f"class_weights must be 'balanced' or a number >= 0 for each class, got {class_weights!r}; correct them."
        )


def build_class_weights(class_weights: ClassWeights, data: object, num_classes: int) -> Tensor | None:
    """Return the factor of each class, float32 ``(C,)``.

    Balanced weights are N / (C n) for a class of n of the N labelled training images: each class counts as much as any
    other. Where an image may have several classes they are (N - n) / n, the factor of the images that have the class:
    these count as much as those that lack it.

    Args:
        class_weights: Argument of the module.
        data: Data module of the run.
        num_classes: C.

    Raises:
        UserError: If there are not C of them, or the labels of the training images are not known.
    """
    if class_weights is None:
        return None
    if class_weights != "balanced":
        if len(class_weights) != num_classes:
            raise UserError(
                f"class_weights has {len(class_weights)} numbers for {num_classes} classes; give one for each."
            )
        return torch.tensor(class_weights, dtype=torch.float32)
    samples = getattr(data, "train_samples", None)
    if not is_image_data(data) or samples is None:
        raise UserError(
            "class_weights='balanced' needs the labels of all training images, which only the data modules of "
            "kd_lightning know; give a number for each class."
        )
    labels = data.splits["train"].labels[samples]
    if data.multi_label:
        labels = labels[is_labelled(labels)]
        positive = labels.sum(0).clamp(min=1)
        return ((len(labels) - positive).clamp(min=1) / positive).float()
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes).clamp(min=1)
    return (counts.sum() / (num_classes * counts)).float()
