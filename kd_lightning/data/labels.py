"""Class indices, class probabilities, and several classes of one image."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError

_ROUNDING = 0.02  # of the sum of probabilities in half precision, or with two decimals


def check_labels(labels: Tensor, *, num_classes: int, split: str = "", multi_label: bool = False) -> None:
    """Check that labels are classes, -1 for unlabelled, or class probabilities; the device is waited for once.

    Args:
        labels: Class indices ``(B,)``, or class probabilities ``(B, C)``, with rows of -1 where unlabelled.
        num_classes: Number of classes.
        split: Name of the split, for the message, if there is one.
        multi_label: Whether images may have several classes: labels are then 1 for each class of an image and 0 for
            the others, ``(B, C)``, fractions of the two where images were mixed, with rows of -1 where unlabelled.

    Raises:
        UserError: If an index is below -1, or at least ``num_classes``; if a row of floats is no distribution over the
            classes, or of multi-label data not between 0 and 1.

    Example:
        >>> check_labels(torch.tensor([0, 2, -1]), num_classes=3)
        >>> check_labels(torch.tensor([[1.0, 0.0, 1.0], [-1.0, -1.0, -1.0]]), num_classes=3, multi_label=True)
    """
    if not len(labels):
        return
    images = f" of the {split!r} images" if split else ""
    if multi_label:
        _check_several(labels, num_classes, images)
        return
    if labels.is_floating_point():
        _check_probabilities(labels, num_classes)
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < -1 or high >= num_classes:
        raise UserError(
            f"Label {low if low < -1 else high}{images} is outside [0, {num_classes}) (-1 means unlabelled); correct "
            "the labels, or the number of classes."
        )


def is_labelled(labels: Tensor) -> Tensor:
    """Return which rows have a label, bool ``(B,)``; a row of zeros, an image with none of the classes, has one.

    Args:
        labels: Labels of any kind, as for :func:`check_labels`.

    Example:
        >>> is_labelled(torch.tensor([2, -1])), is_labelled(torch.tensor([[0.0, 0.0], [-1.0, -1.0]]))
        (tensor([ True, False]), tensor([ True, False]))
    """
    return labels >= 0 if labels.dim() == 1 else (labels >= 0).any(1)


def stratum(labels: Tensor) -> Tensor:
    """Return the class by which an image is put into a split, int64 ``(N,)``, -1 where unlabelled.

    That is its class; of several the rarest one, so that rare classes are divided as evenly as frequent ones; C for an
    image with none.

    Args:
        labels: Class indices ``(N,)``, or 1 for each class of an image and 0 for the others, ``(N, C)``.

    Example:
        >>> stratum(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]))
        tensor([ 1,  0,  2, -1])
    """
    if labels.dim() == 1:
        return labels
    has = labels > 0
    counts = has.sum(0)
    rarest = torch.where(has, counts, len(labels) + 1).argmin(1)
    return torch.where(is_labelled(labels), torch.where(has.any(1), rarest, labels.shape[1]), -1)


def _check_several(labels: Tensor, num_classes: int, images: str) -> None:
    if labels.dim() != 2 or labels.shape[1] != num_classes:
        raise UserError(
            f"The labels{images} have the shape {tuple(labels.shape)}, but the data declare multi_label and there are "
            f"{num_classes} classes; give (B, {num_classes}), 1 for each class of an image and 0 for the others."
        )
    unlabelled = (labels == -1).all(1)
    low, high = torch.where(unlabelled[:, None], 0, labels).float().aminmax()
    lowest, highest = torch.stack([low, high]).tolist()
    if not (lowest >= 0 and highest <= 1):  # NaN is neither
        found = f"{highest if lowest >= 0 else lowest:.4g}"
        raise UserError(
            f"The labels{images} contain {found}, but of multi-label data they are 1 for each class of an image and 0 "
            "for the others, or -1 in a whole row that is unlabelled; correct them."
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
            f"{found}; give class indices (B,), or, if an image may have several classes, declare multi_label = True "
            "in the data module."
        )
