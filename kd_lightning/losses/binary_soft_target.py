"""Knowledge distillation where an image may have several classes: the teacher's probability of each as a target."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def binary_soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Compute the divergence of the student from the teacher, class by class.

    .. math:: T^2 \cdot \frac{1}{B} \sum_b \sum_c
        \mathrm{KL}(\mathrm{Bernoulli}(\sigma(z^t_{bc} / T)) \,\|\, \mathrm{Bernoulli}(\sigma(z^s_{bc} / T)))

    It is summed over the classes and averaged over the rows, as released.

    Args:
        student_logits: ``(B, C)``.
        teacher_logits: ``(B, C)``.
        temperature: T > 0; the higher, the softer.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> import torch
        >>> binary_soft_target_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), temperature=1.0)
        tensor(0.1497)
    """
    student, teacher = student_logits / temperature, teacher_logits / temperature
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (present + absent).sum(1).mean() * temperature**2


class BinarySoftTargetLoss(DistillationLoss):
    """Knowledge distillation for multi-label data: MLD, the multi-label logits distillation of L2D.

    P. Yang et al.: Multi-Label Knowledge Distillation, ICCV 2023, https://arxiv.org/abs/2308.06453; authors' code:
    https://github.com/penghui-yang/L2D, where T is 1 and probabilities are clamped to [1e-8, 1 - 1e-8]; here logarithms
    are computed from logits, which needs no clamp.

    Args:
        temperature: T > 0; 1 as released.
        weight: Factor of the term in the weighted sum; 0.9 with a weight of 0.1 on the labels (10 and 1 as released).
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature is not above 0.

    Example:
        >>> import torch
        >>> loss = BinarySoftTargetLoss()
        >>> student, teacher = Outputs(torch.zeros(1, 2)), Outputs(torch.tensor([[4.0, 0.0]]))
        >>> loss(student, teacher, torch.tensor([[1.0, 0.0]]))
        tensor(0.6031)
    """

    compares_logits = True
    multi_label = True

    def __init__(self, temperature: float = 1.0, *, weight: float = 0.9, warmup_epochs: int = 0) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return binary_soft_target_loss(student.logits, teacher.logits.detach(), temperature=self.temperature)
