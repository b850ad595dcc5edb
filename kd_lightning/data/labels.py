"""Check of class indices."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError


def check_labels(labels: Tensor, *, num_classes: int, split: str = "") -> None:
    """Check that class indices are classes, or -1 for unlabelled; the device is waited for once.

    Args:
        labels: Class indices ``(B,)``; class probabilities are not checked.
        num_classes: Number of classes.
        split: Name of the split, for the message, if there is one.

    Raises:
        UserError: If an index is below -1, or at least ``num_classes``.

    Example:
        >>> check_labels(torch.tensor([0, 2, -1]), num_classes=3)
    """
    if labels.is_floating_point() or not len(labels):
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < -1 or high >= num_classes:
        images = f" of the {split!r} images" if split else ""
        raise UserError(
            f"Label {low if low < -1 else high}{images} is outside [0, {num_classes}) (-1 means unlabelled); correct "
            "the labels, or the number of classes."
        )
