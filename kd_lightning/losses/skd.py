"""SKD: KD, and how the directions of the logits in a batch lie to each other."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._confidence import less_confident, masked_share
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._labels import divergence
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.hard_target import hard_target_loss
from kd_lightning.losses.soft_target import soft_target_loss


@in_full_precision
def skd_instance_loss(logits_student: Tensor, logits_teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Compute KD, :func:`~kd_lightning.losses.soft_target_loss`.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> skd_instance_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), temperature=2.0)
        tensor(0.4898)
    """
    return soft_target_loss(logits_student, logits_teacher, temperature=temperature)


@in_full_precision
def skd_direction_loss(logits_student: Tensor, logits_teacher: Tensor, *, tikhonov: float = 0.1) -> Tensor:
    r"""Compute the mean Mahalanobis length of the rows of a difference of two cosine matrices.

    .. math:: \frac{1}{B} \sum_b \sqrt{D_b \, S^{-1} D_b'} \quad \text{with} \quad
              D = \frac{1}{C} (\hat z^s \hat z^{s\prime} - \hat z^t \hat z^{t\prime})

    with rows :math:`\hat z` of length 1 and S the covariance of D's columns plus L times the identity. The gradient
    runs through S too. D is of the order of 1 / C, so that at the published L = 0.1 the covariance has no effect (S is
    L times the identity to 2e-5 for 64 samples of 100 classes) and this is the mean length of the rows of D, divided
    by the root of L. Where a row of D is 0 the released code's gradient is infinite; here it is 0.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        tikhonov: L > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> skd_direction_loss(torch.eye(2), torch.ones(2, 2), tikhonov=1.0)
        tensor(0.4743)
    """
    return _mean_length(_difference(logits_student, logits_teacher) / logits_student.shape[1], tikhonov)


@in_full_precision
def skd_instance_masked_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    *,
    temperature: float = 4.0,
    kd_weight: float = 0.9,
    corrected: bool = False,
) -> Tensor:
    """Compute :func:`skd_instance_loss`, scaled by the mask of the released code.

    That mask, of the less confident half of the samples, multiplies a mean and so selects nothing: it scales by its
    share of ones (1/2, of an odd number of samples (B + 1) / 2B; where teachers are equally confident the released
    mask is larger).

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        temperature: T > 0.
        kd_weight: Factor.
        corrected: Whether the mask selects the samples of which the teacher is less confident.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
        >>> skd_instance_masked_loss(student, teacher, temperature=2.0, kd_weight=0.5)
        tensor(0.2449)
    """
    rows = divergence(*((z / temperature).log_softmax(1) for z in (logits_student, logits_teacher)))
    mask = less_confident(logits_teacher.softmax(1).amax(1)) if corrected else masked_share(len(rows))
    return kd_weight * temperature**2 * (mask * rows).mean()


@in_full_precision
def skd_direction_masked_loss(
    logits_student: Tensor, logits_teacher: Tensor, *, tikhonov: float = 0.1, kd_weight: float = 0.9
) -> Tensor:
    """Compute :func:`skd_direction_loss`, scaled by the mask of the released code.

    That mask, of the less confident half of the classes, multiplies a mean over samples and so only scales it by its
    share of ones (1/2, of an odd number of classes (C + 1) / 2C). There is nothing that it could select.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        tikhonov: L > 0.
        kd_weight: Factor.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> skd_direction_masked_loss(torch.eye(2), torch.ones(2, 2), tikhonov=1.0, kd_weight=0.5)
        tensor(0.1186)
    """
    scale = kd_weight * masked_share(logits_student.shape[1])
    return scale * skd_direction_loss(logits_student, logits_teacher, tikhonov=tikhonov)


@in_full_precision
def skd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    tikhonov: float = 0.1,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    corrected: bool = False,
) -> Tensor:
    """Compute the whole published objective: the cross-entropy and both masked terms.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        target: Class indices ``(B,)``, -1 where a row is unlabelled, or class probabilities ``(B, C)``.
        temperature: T > 0.
        tikhonov: L > 0.
        ce_weight: Factor of the cross-entropy.
        kd_weight: Factor of both other terms.
        corrected: Whether the mask of samples selects, see :func:`skd_instance_masked_loss`.

    Returns:
        A scalar.

    Example:
        >>> skd_loss(torch.eye(2), torch.ones(2, 2), torch.tensor([0, 1]), ce_weight=0.5, kd_weight=0.0)
        tensor(0.1566)
    """
    labels = ce_weight * hard_target_loss(logits_student, target)
    instance = skd_instance_masked_loss(
        logits_student, logits_teacher, temperature=temperature, kd_weight=kd_weight, corrected=corrected
    )
    direction = skd_direction_masked_loss(logits_student, logits_teacher, tikhonov=tikhonov, kd_weight=kd_weight)
    return labels + instance + direction


@in_full_precision
def skd_instance_torchdistill_loss(
    logits_student: Tensor, logits_teacher: Tensor, *, temperature: float = 4.0
) -> Tensor:
    """Compute :func:`skd_instance_loss` as torchdistill does, without its factor of T squared.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> skd_instance_torchdistill_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), temperature=2.0)
        tensor(0.1225)
    """
    return soft_target_loss(logits_student, logits_teacher, temperature=temperature) / temperature**2


@in_full_precision
def skd_direction_torchdistill_loss(logits_student: Tensor, logits_teacher: Tensor, *, tikhonov: float = 0.1) -> Tensor:
    """Compute :func:`skd_direction_loss` as torchdistill does, with a D that is not divided by C.

    There the covariance has an effect.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        tikhonov: L > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> skd_direction_torchdistill_loss(torch.eye(2), torch.ones(2, 2), tikhonov=1.0)
        tensor(0.8660)
    """
    return _mean_length(_difference(logits_student, logits_teacher), tikhonov)


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the student's cosines between each two samples minus the teacher's, ``(B, B)``."""
    student, teacher = normalize(student), normalize(teacher)
    return student @ student.T - teacher @ teacher.T


def _mean_length(difference: Tensor, tikhonov: float) -> Tensor:
    """Return the mean length of rows, measured by the inverse of their covariance plus a multiple of the identity."""
    centered = difference - difference.mean(0)
    covariance = centered.T @ centered / max(len(difference) - 1, 1)
    identity = torch.eye(len(difference), dtype=difference.dtype, device=difference.device)
    # cholesky_ex does not wait for the device; S is positive definite
    root = torch.linalg.cholesky_ex(covariance + tikhonov * identity).L
    whitened = torch.linalg.solve_triangular(root, difference.T, upper=False)
    lengths: Tensor = torch.linalg.vector_norm(whitened, dim=0)
    return lengths.mean()


class SKDLoss(DistillationLoss):
    """Streamlined knowledge distillation (SKD): both masked terms of :func:`skd_loss`, over the batch of all ranks.

    Streamlined Knowledge Distillation, CVPR 2026, https://cvpr.thecvf.com/virtual/2026/poster/39253; authors' code:
    https://github.com/HyunJunSik/StreamLined

    The paper trains on a weakly and a strongly augmented view of each sample in one batch, as of a data module with
    ``second_view``; any batch is accepted.

    Args:
        weight: Factor of the term in the weighted sum; 0.9 as released, beside a weight of 0.1 on the labels (0.5 and
            0.5 for ResNet-32x4 to ResNet-8x4).
        temperature: T > 0; 4 as released (1 on ImageNet).
        tikhonov: L > 0; 0.1 as released, at which the covariance has no effect, see :func:`skd_direction_loss`.
        corrected: Whether the mask of samples selects, see :func:`skd_instance_masked_loss`.
        gather: Whether to compare the samples of the batches of all ranks, and not of each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature or L is not above 0.

    Example:
        >>> student, teacher = Outputs(torch.rand(4, 10)), Outputs(torch.rand(4, 10))
        >>> SKDLoss()(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 0.9,
        temperature: float = 4.0,
        tikhonov: float = 0.1,
        corrected: bool = False,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        if not (temperature > 0 and tikhonov > 0):
            raise UserError(f"temperature and tikhonov must be above 0, got {temperature} and {tikhonov}.")
        self.temperature = temperature
        self.tikhonov = tikhonov
        self.corrected = corrected
        self.gather = gather

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        logits = all_gather_grad(student.logits, teacher.logits.detach(), active=self.gather and self.training)
        instance = skd_instance_masked_loss(
            *logits, temperature=self.temperature, kd_weight=1.0, corrected=self.corrected
        )
        return instance + skd_direction_masked_loss(*logits, tikhonov=self.tikhonov, kd_weight=1.0)
