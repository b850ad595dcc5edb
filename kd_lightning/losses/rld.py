"""RLD: the teacher refined by the label, which gets its confidence; only classes below the label are compared."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._labels import class_indices, class_or_not, divergence, label_column, mean_of_labelled
from kd_lightning.losses._normalize import z_score
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss

_NEVER = -1e9
"""Logit of a class that is left out, as released; finite, for rows of which no class is left."""


@in_full_precision
def rld_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    alpha_temperature: float = 1.0,
    logit_stand: bool = False,
) -> Tensor:
    r"""Compute the divergences of the label's probability from the teacher's confidence, and of the classes below it.

    .. math:: \frac{1}{B} \sum_b \alpha A^2 \, \mathrm{KL}\big((m_b, 1 - m_b) \,\|\, (p_b, 1 - p_b)\big)
              + \beta T^2 \, \mathrm{KL}(\tilde p^t_b \,\|\, \tilde p^s_b)

    with :math:`m = \max_c p^t_c` and :math:`p = p^s_y` at temperature A, and :math:`\tilde p` the softmax at
    temperature T over the classes that the teacher puts below the label. So a teacher that is wrong still gives its
    confidence, to the label, and what it puts above the label, or beside it, is ignored.

    Args:
        logits_student: ``(B, C)``, C >= 2.
        logits_teacher: ``(B, C)``.
        target: Class indices ``(B,)``, where -1 leaves a row out, or class probabilities ``(B, C)``, of which the
            largest counts.
        alpha: Weight of the confidence.
        beta: Weight of the classes below the label.
        temperature: T > 0.
        alpha_temperature: A > 0.
        logit_stand: Whether each row of logits on both sides is replaced by its z-scores (unbiased standard
            deviation + 1e-7).

    Returns:
        A scalar >= 0, and 0 where no row has a label.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> rld_loss(student, teacher, torch.tensor([0]), temperature=2.0)
        tensor(1.2874)
    """
    if logit_stand:
        logits_student, logits_teacher = z_score(logits_student), z_score(logits_teacher)
    target = class_indices(target)
    label, highest = label_column(target), logits_teacher.argmax(1, keepdim=True)
    confidence = divergence(
        class_or_not(logits_student / alpha_temperature, label),
        class_or_not(logits_teacher / alpha_temperature, highest),
    )
    ignored = logits_teacher >= logits_teacher.gather(1, label)
    student, teacher = (
        F.log_softmax((z / temperature).masked_fill(ignored, _NEVER), dim=1) for z in (logits_student, logits_teacher)
    )
    rows = alpha * alpha_temperature**2 * confidence + beta * temperature**2 * divergence(student, teacher)
    return mean_of_labelled(rows, target)


class RLDLoss(DistillationLoss):
    """Refined logit distillation (RLD): :func:`rld_loss`.

    W. Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025, https://arxiv.org/abs/2408.07703;
    authors' code: https://github.com/zju-SWJ/RLD

    Unlike the released code, which takes the logarithm of sums of probabilities, it is computed from log-probabilities
    and stays finite where logits are large.

    Args:
        weight: Factor of the term in the weighted sum; 1 as released, beside a weight of 1 on the labels.
        alpha: Weight of the confidence; 1 as released (9 with ``logit_stand``).
        beta: Weight of the classes below the label; 8, as released for ResNet-32x4 to ResNet-8x4 on CIFAR-100 (9 times
            that with ``logit_stand``; 0.5 for ResNet-34 to ResNet-18 on ImageNet).
        temperature: T > 0; 4 as released (2 with ``logit_stand``, 1 on ImageNet).
        alpha_temperature: A > 0; 1 as released (2 with ``logit_stand``).
        logit_stand: Whether z-scores of the logits are compared.
        warmup_epochs: Epochs over which the weight rises linearly to its value; 20 as released (0 on ImageNet).

    Raises:
        ValueError: If a temperature is not above 0 or a weight is negative.

    Example:
        >>> import torch
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> RLDLoss()(student, teacher, torch.tensor([3, 1])).shape
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
        alpha_temperature: float = 1.0,
        logit_stand: bool = False,
        warmup_epochs: int = 20,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        if not (temperature > 0 and alpha_temperature > 0):
            raise UserError(
                f"temperature and alpha_temperature must be above 0, got {temperature} and {alpha_temperature}."
            )
        if not (alpha >= 0 and beta >= 0):
            raise UserError(f"alpha and beta must be >= 0, got {alpha} and {beta}.")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.alpha_temperature = alpha_temperature
        self.logit_stand = logit_stand

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return rld_loss(
            student.logits,
            teacher.logits.detach(),
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            alpha_temperature=self.alpha_temperature,
            logit_stand=self.logit_stand,
        )
