"""Class indices, and class probabilities in their place."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError

_ROUNDING = 0.02  # of the sum of probabilities in half precision, or with two decimals


def check_labels(labels: Tensor, *, num_classes: int, split: str = "") -> None:
    """Check that labels are classes, -1 for unlabelled, or class probabilities; the device is waited for once.

    Args:
        labels: Class indices ``(B,)``, or class probabilities ``(B, C)``, with rows of -1 where unlabelled.
        num_classes: Number of classes.
        split: Name of the split, for the message, if there is one.

    Raises:
        UserError: If an index is below -1, or at least ``num_classes``; if a row of floats is no distribution over the
            classes.

    Example:
        >>> check_labels(torch.tensor([0, 2, -1]), num_classes=3)
    """
    if not len(labels):
        return
    if labels.is_floating_point():
        _check_probabilities(labels, num_classes)
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < -1 or high >= num_classes:
        images = f" of the {split!r} images" if split else ""
        raise UserError(
            f"Label {low if low < -1 else high}{images} is outside [0, {num_classes}) (-1 means unlabelled); correct "
            "the labels, or the number of classes."
        )


def _check_probabilities(labels: Tensor, num_classes: int) -> None:
    if labels.shape[1] != num_classes:
        raise UserError(
            f"The labels are probabilities of {labels.shape[1]} classes, but there are {num_classes}; give each row "
            f"{num_classes} columns."
        )
    unlabelled = (labels == -1).all(1)
    low = torch.where(unlabelled[:, None], 0, labels).min()
    sums = torch.where(unlabelled, 1.0, labels.float().sum(1))
    farthest = sums[(sums - 1).abs().argmax()]  # NaN where there is one
    lowest, total = torch.stack([low.float(), farthest]).tolist()
    if not (lowest >= 0 and abs(total - 1) <= _ROUNDING):
        found = f"one sums to {total:.4g}" if lowest >= 0 else f"one contains {lowest:.4g}"
        raise UserError(
            "Rows of float labels must be class probabilities, which are >= 0 and sum to 1, but "
            f"{found}; give class indices (B,), since multi-hot rows, several classes of one image, are not supported."
        )
