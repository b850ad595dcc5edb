"""DIST: the student's probabilities correlate with the teacher's, sample by sample and class by class."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._normalize import center
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""Compute one minus Pearson's correlation of the softened probabilities, over classes and over samples.

    .. math:: T^2 \Big( \beta \frac{1}{B} \sum_b \big( 1 - \rho(p^s_{b \cdot}, p^t_{b \cdot}) \big)
              + \gamma \frac{1}{C} \sum_c \big( 1 - \rho(p^s_{\cdot c}, p^t_{\cdot c}) \big) \Big)

    A shift or a positive factor on a row or a column of probabilities changes nothing in its half.

    Args:
        student_logits: ``(B, C)``.
        teacher_logits: ``(B, C)``.
        beta: Weight of the correlation over the classes of each sample.
        gamma: Weight of the correlation over the samples for each class.
        temperature: T > 0.

    Returns:
        A scalar in [0, 2 T^2 (beta + gamma)]; 0 where both agree and all probabilities vary. What hardly varies (a
        class that no sample is given, and each class in a batch of one) counts as uncorrelated.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
        >>> dist_loss(logits, logits).item() < 1e-5
        True
    """
    student, teacher = (student_logits / temperature).softmax(1), (teacher_logits / temperature).softmax(1)
    distances = beta * correlation_distance(student, teacher) + gamma * correlation_distance(student.T, teacher.T)
    return distances * temperature**2


def correlation_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return one minus the mean correlation of paired rows; a constant row has none, and no gradient towards one.

    Args:
        a: ``(B, n)``.
        b: ``(B, n)``.
    """
    (a, a_lengths, a_constant), (b, b_lengths, b_constant) = center(a), center(b)
    correlations = (a * b).sum(1, keepdim=True) / (a_lengths * b_lengths + 1e-8)  # the released code's epsilon
    return 1 - torch.where(a_constant | b_constant, 0.0, correlations).mean()


class DistLoss(DistillationLoss):
    """DIST: :func:`dist_loss`, with the correlation over samples taken in the batch of all ranks.

    T. Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, https://arxiv.org/abs/2205.10536;
    authors' code: https://github.com/hunto/DIST_KD

    Args:
        temperature: T > 0; 4, the authors' for CIFAR-100 (1 on ImageNet).
        weight: Factor of the term in the weighted sum; 2 as released, beside a weight of 1 on the labels.
        beta: Weight of the correlation over classes; 1 as released.
        gamma: Weight of the correlation over samples; 1 as released.
        gather: Whether to correlate over the batch of all ranks, and not over each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature is not above 0 or a weight is negative.

    Example:
        >>> student, teacher = Outputs(torch.rand(4, 10)), Outputs(torch.rand(4, 10))
        >>> DistLoss()(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        weight: float = 2.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(temperature=temperature)
        if not (beta >= 0 and gamma >= 0):
            raise UserError(f"beta and gamma must be >= 0, got {beta} and {gamma}.")
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma
        self.gather = gather

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        student_logits, teacher_logits = all_gather_grad(
            student.logits, teacher.logits.detach(), active=self.gather and self.training
        )
        return dist_loss(student_logits, teacher_logits, beta=self.beta, gamma=self.gamma, temperature=self.temperature)
