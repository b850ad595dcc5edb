"""Transformed teacher matching (TTM): the teacher's probabilities to a power below 1, the student's as they are."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._labels import divergence
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def ttm_loss(logits_student: Tensor, logits_teacher: Tensor, *, gamma: float = 0.1) -> Tensor:
    r"""Compute the divergence of the student from the teacher's probabilities to a power, normalized.

    .. math:: \frac{1}{B} \sum_b \mathrm{KL}(q_b \,\|\, \mathrm{softmax}(z^s_b))
              \quad \text{with} \quad q_b \propto \mathrm{softmax}(z^t_b)^\gamma

    The power is a temperature of :math:`1 / \gamma` of the teacher alone, and nothing is multiplied by its square.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        gamma: The power, > 0; the smaller, the softer.

    Returns:
        A scalar >= 0, and 0 where the student gives the powers.

    Example:
        >>> import torch
        >>> ttm_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), gamma=0.5)
        tensor(0.2729)
    """
    return _powers(logits_student, logits_teacher, gamma)[1].mean()


@in_full_precision
def wttm_loss(logits_student: Tensor, logits_teacher: Tensor, *, gamma: float = 0.1) -> Tensor:
    r"""Compute :func:`ttm_loss` with each row weighted by the sum of the teacher's powers.

    .. math:: \frac{1}{B} \sum_b \Big( \sum_c (p^t_{bc})^\gamma \Big) \,
              \mathrm{KL}(q_b \,\|\, \mathrm{softmax}(z^s_b))

    The weight is 1 where the teacher is certain and :math:`C^{1 - \gamma}` where it does not prefer any class.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        gamma: The power, > 0.

    Returns:
        A scalar >= 0, and 0 where the student gives the powers.

    Example:
        >>> import torch
        >>> wttm_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), gamma=0.5)
        tensor(0.3748)
    """
    weights, divergences = _powers(logits_student, logits_teacher, gamma)
    return (weights * divergences).mean()


def _powers(student: Tensor, teacher: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the teacher's powers and the divergence from them, each ``(B,)``."""
    powers = gamma * F.log_softmax(teacher, dim=1)
    sums = powers.logsumexp(1, keepdim=True)
    return sums.exp().squeeze(1), divergence(F.log_softmax(student, dim=1), powers - sums)


class TTMLoss(DistillationLoss):
    """Transformed teacher matching (TTM): :func:`ttm_loss`.

    K. Zheng, E.-H. Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024,
    https://arxiv.org/abs/2402.11148; authors' code: https://github.com/zkxufo/TTM

    Args:
        weight: Factor of the term in the weighted sum; 45, of an example of the release for CIFAR-100 (the weight is
            chosen for each pair of networks), beside a weight of 1 on the labels.
        gamma: The power of the teacher's probabilities, > 0; 0.1 in that example.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If gamma is not above 0.

    Example:
        >>> import torch
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> TTMLoss()(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(self, *, weight: float = 45.0, gamma: float = 0.1, warmup_epochs: int = 0) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(gamma=gamma)
        self.gamma = gamma

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return ttm_loss(student.logits, teacher.logits.detach(), gamma=self.gamma)


class WTTMLoss(DistillationLoss):
    """Weighted transformed teacher matching (WTTM): :func:`wttm_loss`. For the papers see :class:`TTMLoss`.

    Args:
        weight: Factor of the term in the weighted sum; 4, of an example of the release for CIFAR-100 (beside CRD with
            a weight of 0.8 and a weight of 1 on the labels).
        gamma: The power of the teacher's probabilities, > 0; 0.2 in that example.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If gamma is not above 0.

    Example:
        >>> import torch
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> WTTMLoss()(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(self, *, weight: float = 4.0, gamma: float = 0.2, warmup_epochs: int = 0) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(gamma=gamma)
        self.gamma = gamma

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return wttm_loss(student.logits, teacher.logits.detach(), gamma=self.gamma)
