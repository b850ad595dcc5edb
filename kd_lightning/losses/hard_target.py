"""Cross-entropy with the true labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_fraction
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def hard_target_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    all_labelled: bool = False,
) -> Tensor:
    r"""Compute the cross-entropy with the labels, averaged over the labelled rows (0 where there are none).

    With weights it is their weighted mean, :math:`\sum_b w_b \ell_b / \sum_b w_b`.

    Args:
        logits: ``(B, C)``.
        labels: Class indices ``(B,)``, -1 where a row is unlabelled, or class probabilities ``(B, C)``, with a row of
            -1 where it is.
        label_smoothing: Fraction of the target that is spread over all classes, in [0, 1].
        weights: Weights of the rows, ``(B,)``, >= 0; equal by default.
        all_labelled: Whether every row is known to be labelled, which makes fewer operations.

    Example:
        >>> hard_target_loss(torch.zeros(2, 4), torch.tensor([3, -1]))
        tensor(1.3863)
    """
    if weights is not None:
        return _weighted(logits, labels, label_smoothing, weights)
    if all_labelled:
        targets = labels.to(logits.dtype) if labels.is_floating_point() else labels
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if labels.is_floating_point():
        return _weighted(logits, labels, label_smoothing, torch.ones_like(logits[:, 0]))
    total = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def row_weights(labels: Tensor, class_weights: Tensor) -> Tensor:
    """Return the weight of each row by its class, ``(B,)``; of class probabilities the expected one.

    Args:
        labels: Class indices ``(B,)`` or class probabilities ``(B, C)``; any weight for those that are unlabelled.
        class_weights: ``(C,)``.

    Example:
        >>> row_weights(torch.tensor([1, 0, 1]), torch.tensor([1.0, 3.0]))
        tensor([3., 1., 3.])
    """
    if labels.is_floating_point():
        return labels.to(class_weights.dtype).clamp(min=0) @ class_weights
    return class_weights[labels.clamp(min=0)]


def _weighted(logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor) -> Tensor:
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
        weights = weights * (labels >= 0).any(1)
    else:
        weights = weights * (labels >= 0)
    errors = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="none")
    return (weights * errors).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


class HardTargetLoss(DistillationLoss):
    """The student's cross-entropy with the true labels, :func:`hard_target_loss`; in domain adaptation the source's.

    The ``class_weights`` of the module weigh the rows.

    Args:
        weight: Factor of the term in the weighted sum.
        label_smoothing: Fraction of the target that is spread over all classes, in [0, 1].
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If ``label_smoothing`` lies outside [0, 1].

    Example:
        >>> loss = HardTargetLoss(label_smoothing=0.1)
        >>> outputs = Outputs(torch.zeros(2, 4))
        >>> loss(outputs, outputs, torch.tensor([3, -1]))
        tensor(1.3863)
    """

    needs_teacher = False
    multi_label = False
    weighs_classes = True

    def __init__(self, *, weight: float = 1.0, label_smoothing: float = 0.0, warmup_epochs: int = 0) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_fraction(label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        weights = None if self.class_weights is None else row_weights(labels, self.class_weights)
        return hard_target_loss(
            student.logits,
            labels,
            label_smoothing=self.label_smoothing,
            weights=weights,
            all_labelled=self.all_labelled,
        )
