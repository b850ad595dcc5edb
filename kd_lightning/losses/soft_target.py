"""Knowledge distillation: the teacher's softened probabilities as targets."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._normalize import z_score
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def soft_target_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, standardize: bool = False
) -> Tensor:
    r"""Compute the divergence of the softened student from the softened teacher.

    .. math:: T^2 \cdot \frac{1}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(z^t_b / T) \,\|\, \mathrm{softmax}(z^s_b / T))

    Args:
        student_logits: ``(B, C)``.
        teacher_logits: ``(B, C)``.
        temperature: T > 0; the higher, the softer.
        standardize: Whether each row of logits on both sides is replaced by its z-scores (unbiased standard
            deviation + 1e-7).

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> import torch
        >>> soft_target_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), temperature=2.0)
        tensor(0.4898)
    """
    if standardize:
        student_logits, teacher_logits = z_score(student_logits), z_score(teacher_logits)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class SoftTargetLoss(DistillationLoss):
    """Knowledge distillation (KD), and with ``standardize=True`` its logit-standardized form.

    G. Hinton, O. Vinyals, J. Dean: Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531
    S. Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024, https://arxiv.org/abs/2403.01427;
    authors' code: https://github.com/sunshangquan/logit-standardization-KD

    Args:
        temperature: T > 0. 4 is the usual choice on CIFAR (and 2 with ``standardize``).
        weight: Factor of the term in the weighted sum; 0.9 with a weight of 0.1 on the labels, 9 with
            ``standardize``, as released.
        standardize: Whether z-scores of the logits are compared.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature is not above 0.

    Example:
        >>> import torch
        >>> loss = SoftTargetLoss(temperature=4.0, weight=0.9)
        >>> student, teacher = Outputs(torch.zeros(1, 2)), Outputs(torch.tensor([[4.0, 0.0]]))
        >>> loss(student, teacher, torch.tensor([0]))
        tensor(1.7751)
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self, temperature: float = 4.0, *, weight: float = 0.9, standardize: bool = False, warmup_epochs: int = 0
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.standardize = standardize

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return soft_target_loss(
            student.logits, teacher.logits.detach(), temperature=self.temperature, standardize=self.standardize
        )
