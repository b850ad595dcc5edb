"""Decoupled knowledge distillation: the label's class and the others are compared separately."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._labels import (
    class_indices,
    class_or_not,
    divergence,
    label_column,
    mean_of_labelled,
    other_classes,
)
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def decoupled_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Compute the divergences of "the label's class or not" and of "which other class", weighted separately.

    .. math:: T^2 \cdot \frac{1}{B} \sum_b \alpha \, \mathrm{KL}(b^t_b \,\|\, b^s_b)
              + \beta \, \mathrm{KL}(\hat p^t_b \,\|\, \hat p^s_b)

    with :math:`b = (p_y, 1 - p_y)` and :math:`\hat p` the softmax over the other classes, both at temperature T. With
    :math:`\beta = \alpha (1 - p^t_y)` for each sample it would be the loss of :func:`soft_target_loss`.

    Args:
        student_logits: ``(B, C)``, C >= 2.
        teacher_logits: ``(B, C)``.
        labels: Class indices ``(B,)``, where -1 leaves a row out, or class probabilities ``(B, C)``, of which the
            largest counts.
        alpha: Weight of the label's class.
        beta: Weight of the other classes.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree or no row has a label.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> decoupled_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=2.0)
        tensor(1.2379)
    """
    labels = class_indices(labels)
    label = label_column(labels)
    student, teacher = student_logits / temperature, teacher_logits / temperature
    target = divergence(class_or_not(student, label), class_or_not(teacher, label))
    others = divergence(*(F.log_softmax(other_classes(z, label), dim=1) for z in (student, teacher)))
    return mean_of_labelled(alpha * target + beta * others, labels) * temperature**2


class DecoupledLoss(DistillationLoss):
    """Decoupled knowledge distillation (DKD): :func:`decoupled_loss`.

    B. Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022, https://arxiv.org/abs/2203.08679;
    authors' code: https://github.com/megvii-research/mdistiller

    Args:
        weight: Factor of the term in the weighted sum; 1 as released, beside a weight of 1 on the labels.
        alpha: Weight of the label's class; 1 as released.
        beta: Weight of the other classes; 8, as released for ResNet-32x4 to ResNet-8x4 on CIFAR-100.
        temperature: T > 0; 4 as released.
        warmup_epochs: Epochs over which the weight rises linearly to its value; 20 as released.

    Raises:
        ValueError: If the temperature is not above 0 or a weight is negative.

    Example:
        >>> import torch
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> DecoupledLoss()(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup_epochs: int = 20,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(temperature=temperature)
        if not (alpha >= 0 and beta >= 0):
            raise UserError(f"alpha and beta must be >= 0, got {alpha} and {beta}.")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return decoupled_loss(
            student.logits,
            teacher.logits.detach(),
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
