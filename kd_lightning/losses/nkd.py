"""NKD: the teacher's probability of the label weighs the cross-entropy, and its other classes are normalized."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._labels import (
    class_indices,
    label_column,
    label_cross_entropy,
    mean_of_labelled,
    other_classes,
)
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def nkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, temperature: float = 1.0, gamma: float = 1.5
) -> Tensor:
    r"""Compute the label's cross-entropy, weighted by the teacher, and the cross-entropy of the other classes.

    .. math:: -\frac{1}{B} \sum_b \Big( p^t_{by} \log p^s_{by}
              + \gamma T^2 \sum_{c \ne y} \hat p^t_{bc} \log \hat p^s_{bc} \Big)

    with :math:`p` the softmax at temperature 1 and :math:`\hat p` that over the other classes at temperature T. Both
    sums are cross-entropies and no divergences: where both networks agree the loss is not 0, its gradient is smallest.

    Args:
        logits_student: ``(B, C)``, C >= 2.
        logits_teacher: ``(B, C)``.
        target: Class indices ``(B,)``, where -1 leaves a row out, or class probabilities ``(B, C)``, of which the
            largest counts.
        temperature: T > 0, of the other classes.
        gamma: Weight of the other classes.

    Returns:
        A scalar >= 0, and 0 where no row has a label.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> nkd_loss(student, teacher, torch.tensor([0]), temperature=2.0, gamma=1.5)
        tensor(5.0812)
    """
    target = class_indices(target)
    label = label_column(target)
    labelled = label_cross_entropy(logits_student, logits_teacher, label)
    student, teacher = (other_classes(z / temperature, label) for z in (logits_student, logits_teacher))
    others = -(teacher.softmax(1) * F.log_softmax(student, dim=1)).sum(1)
    return mean_of_labelled(labelled + gamma * temperature**2 * others, target)


class NKDLoss(DistillationLoss):
    """Normalized knowledge distillation (NKD): :func:`nkd_loss`.

    Z. Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels, ICCV 2023, https://arxiv.org/abs/2303.13005; authors' code:
    https://github.com/yzd-v/cls_KD

    Args:
        weight: Factor of the term in the weighted sum; 1 as released, beside a weight of 1 on the labels.
        temperature: T > 0, of the classes other than the label's; 3, the authors' for CIFAR-100 (1 on ImageNet).
        gamma: Weight of the other classes; 3.5, as released for ResNet-34 to ResNet-18 on CIFAR-100 (1.5 on ImageNet,
            1 between Vision Transformers).
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature is not above 0 or gamma is negative.

    Example:
        >>> import torch
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> NKDLoss()(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self, *, weight: float = 1.0, temperature: float = 3.0, gamma: float = 3.5, warmup_epochs: int = 0
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(temperature=temperature)
        if not gamma >= 0:
            raise UserError(f"gamma must be >= 0, got {gamma}.")
        self.temperature = temperature
        self.gamma = gamma

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return nkd_loss(student.logits, teacher.logits.detach(), labels, temperature=self.temperature, gamma=self.gamma)
