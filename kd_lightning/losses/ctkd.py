"""CTKD: KD at a temperature that is learned against the student, more strongly epoch by epoch."""

import math

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._labels import divergence
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.adversarial import reverse_gradient
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def ctkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    *,
    global_T: Tensor,  # noqa: N803 - its name in the authors' code
    lambda_: float | Tensor,
    t_start: float = 1.0,
    t_end: float = 20.0,
) -> Tensor:
    r"""Compute KD at a learned temperature, whose own gradient is multiplied by a factor.

    .. math:: T^2 \cdot \frac{1}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(z^t_b / T) \,\|\, \mathrm{softmax}(z^s_b / T))
              \quad \text{with} \quad T = t_\text{start} + t_\text{end} \, \sigma(g)

    With a factor below 0 the optimizer that minimizes the loss raises it through g.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        global_T: The learned number g, ``(1,)``.
        lambda_: Factor of g's gradient; see :func:`ctkd_lambda`.
        t_start: Lowest temperature, > 0.
        t_end: Range of the temperature, > 0; the highest is the sum of both.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> g = torch.zeros(1, requires_grad=True)
        >>> loss = ctkd_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 1.0]]), global_T=g, lambda_=-1.0)
        >>> loss.backward()
        >>> loss.detach(), g.grad
        (tensor(1.9850), tensor([-0.0136]))
    """
    strength = -lambda_
    temperature = t_start + t_end * reverse_gradient(global_T, strength=strength).sigmoid()
    rows = divergence(*((z / temperature).log_softmax(1) for z in (logits_student, logits_teacher)))
    return rows.mean() * temperature.squeeze() ** 2


def ctkd_lambda(epoch: Tensor, *, epochs: int = 10) -> Tensor:
    r"""Compute the factor of the temperature's gradient, :math:`-\frac{1}{2} (1 - \cos(\pi \min(e / n, 1)))`.

    Args:
        epoch: The epoch, counted from 0; e is one more, since the authors count from 1.
        epochs: n, the epoch e from which on the factor is -1.

    Example:
        >>> ctkd_lambda(torch.tensor([0, 4, 9, 200]))
        tensor([-0.0245, -0.5000, -1.0000, -1.0000])
    """
    fraction = ((epoch + 1) / epochs).clamp(max=1)
    return -(1 - (math.pi * fraction).cos()) / 2


class CTKDLoss(DistillationLoss):
    """Curriculum temperature (CTKD): :func:`ctkd_loss` with one learned temperature, logged as ``temperature``.

    Z. Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023, https://arxiv.org/abs/2211.16231;
    authors' code: https://github.com/zhengli97/CTKD

    The temperature trains with the student and is in its checkpoint. This is the global form; the instance-wise one,
    of a temperature for each sample, is not included. Unlike the released code, weight decay leaves it out.

    Args:
        weight: Factor of the term in the weighted sum; 0.9 as released, beside a weight of 0.1 on the labels (1 and 1
            on ImageNet).
        t_start: Lowest temperature, > 0; 1 as released.
        t_end: Range of the temperature, > 0; 20 as released, so that training starts at a temperature of 15.6.
        lambda_epochs: Epochs over which the factor of :func:`ctkd_lambda` reaches -1; 10 as released (5 on ImageNet).
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If ``t_start`` or ``t_end`` is not above 0, or ``lambda_epochs`` below 1.

    Example:
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> loss = CTKDLoss()
        >>> loss(student, teacher, torch.tensor([3, 1])).shape, loss.metrics["temperature"]
        (torch.Size([]), tensor(15.6212))
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 0.9,
        t_start: float = 1.0,
        t_end: float = 20.0,
        lambda_epochs: int = 10,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        if not (t_start > 0 and t_end > 0):
            raise UserError(f"t_start and t_end must be above 0, got {t_start} and {t_end}.")
        if lambda_epochs < 1:
            raise UserError(f"lambda_epochs must be >= 1, got {lambda_epochs}.")
        self.t_start = t_start
        self.t_end = t_end
        self.lambda_epochs = lambda_epochs
        self.global_T = nn.Parameter(torch.ones(1))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        temperature = self.t_start + self.t_end * self.global_T.detach().float().sigmoid()
        self.metrics = {"temperature": temperature.squeeze()}
        return ctkd_loss(
            student.logits,
            teacher.logits.detach(),
            global_T=self.global_T,
            lambda_=ctkd_lambda(self.epoch.to(student.logits.device), epochs=self.lambda_epochs),
            t_start=self.t_start,
            t_end=self.t_end,
        )
