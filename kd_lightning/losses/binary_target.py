"""Cross-entropy with the true labels, where an image may have several classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_fraction
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def binary_target_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    positive_weights: Tensor | None = None,
    all_labelled: bool = False,
) -> Tensor:
    r"""Compute the binary cross-entropies of all classes, averaged over the labelled rows (0 where there are none).

    .. math:: \frac{1}{B} \sum_b \sum_c -w_c \, y_{bc} \log \sigma(z_{bc}) - (1 - y_{bc}) \log (1 - \sigma(z_{bc}))

    They are summed over the classes, as the divergence of :func:`binary_soft_target_loss` is, so that each class is
    learned as fast as it would be alone, however many there are. (torch's ``binary_cross_entropy_with_logits`` divides
    by C by default.)

    Args:
        logits: ``(B, C)``.
        labels: 1 for each class of an image and 0 for the others, ``(B, C)``, with a row of -1 where it is unlabelled;
            fractions under mixup and CutMix.
        label_smoothing: Fraction s by which labels y move towards 1/2, (1 - s) y + s / 2, in [0, 1], as in timm's
            ``BinaryCrossEntropy(smooth_dense=True)``.
        positive_weights: Factors w of the classes where they are present, ``(C,)``; 1 by default.
        all_labelled: Whether every row is known to be labelled, which makes fewer operations.

    Example:
        >>> binary_target_loss(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 1.0], [-1.0, -1.0, -1.0]]))
        tensor(2.0794)
    """
    labels = labels.to(logits.dtype)
    weights = None if positive_weights is None else positive_weights.to(logits.dtype)
    targets = labels if label_smoothing == 0 else torch.lerp(labels, torch.full_like(labels, 0.5), label_smoothing)
    errors = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none").sum(1)
    if all_labelled:
        return errors.mean()
    labelled = (labels >= 0).any(1)
    return torch.where(labelled, errors, 0.0).sum() / labelled.sum().clamp(min=1)


class BinaryTargetLoss(DistillationLoss):
    """The student's binary cross-entropies with the true labels, :func:`binary_target_loss`, for multi-label data.

    The ``class_weights`` of the module weigh each class where it is present.

    Args:
        weight: Factor of the term in the weighted sum.
        label_smoothing: Fraction by which labels move towards 1/2, in [0, 1].
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If ``label_smoothing`` lies outside [0, 1].

    Example:
        >>> outputs = Outputs(torch.zeros(1, 3))
        >>> BinaryTargetLoss()(outputs, None, torch.tensor([[1.0, 0.0, 1.0]]))
        tensor(2.0794)
    """

    needs_teacher = False
    weighs_classes = True
    multi_label = True

    def __init__(self, *, weight: float = 1.0, label_smoothing: float = 0.0, warmup_epochs: int = 0) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_fraction(label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return binary_target_loss(
            student.logits,
            labels,
            label_smoothing=self.label_smoothing,
            positive_weights=self.class_weights,
            all_labelled=self.all_labelled,
        )
