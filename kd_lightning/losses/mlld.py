"""MLLD: predictions compared sample by sample, class by class and within the batch, at several temperatures."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._confidence import less_confident, masked_share
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._labels import divergence
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.hard_target import hard_target_loss


@in_full_precision
def mlld_class_term_loss(logits_student: Tensor, logits_teacher: Tensor, *, temperature: float) -> Tensor:
    r"""Compute the squared difference of how often two classes are predicted together.

    .. math:: \frac{1}{C} \| P_t' P_t - P_s' P_s \|_F^2 \quad \text{with} \quad P = \mathrm{softmax}(z / T)

    The products are sums over the batch, and nothing divides them by its size, as released.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> mlld_class_term_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), temperature=1.0)
        tensor(0.0591)
    """
    return _class_errors(logits_student, logits_teacher, temperature).mean()


@in_full_precision
def mlld_batch_term_loss(logits_student: Tensor, logits_teacher: Tensor, *, temperature: float) -> Tensor:
    r"""Compute the squared difference of how similar the predictions for two samples are.

    .. math:: \frac{1}{B} \| P_t P_t' - P_s P_s' \|_F^2 \quad \text{with} \quad P = \mathrm{softmax}(z / T)

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> mlld_batch_term_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), temperature=1.0)
        tensor(0.0114)
    """
    return _batch_errors(logits_student, logits_teacher, temperature).mean()


@in_full_precision
def mlld_instance_loss(
    logits_student_weak: Tensor,
    logits_student_strong: Tensor | None,
    logits_teacher_weak: Tensor,
    logits_teacher_strong: Tensor | None,
    *,
    temperature: float = 4.0,
    kd_weight: float = 0.9,
    corrected: bool = False,
) -> Tensor:
    r"""Compute KD of two views of each sample at the temperatures T, 3, 5, 2 and 6.

    .. math:: w \Big( h \sum_{T, 3, 5, 2, 6} \mathrm{kd}(\text{weak}) + \sum_{T, 3, 5} \mathrm{kd}(\text{strong})
              + \sum_{2, 6} \mathrm{kd}(\text{weak}) \Big)

    with :math:`\mathrm{kd}` that of :func:`~kd_lightning.losses.soft_target_loss`. The authors' code has two slips. It
    multiplies a mean by the mask of the less confident half of the samples, which selects nothing and only scales by
    its share h (1/2, of an odd number of samples (B + 1) / 2B; where teachers are equally confident the released mask
    is larger). And the strong views' terms at 2 and 6 read the weak views again.

    Args:
        logits_student_weak: Logits of a weakly augmented view, ``(B, C)``.
        logits_student_strong: Logits of a strongly augmented view of the same samples; ``None`` leaves out its terms.
        logits_teacher_weak: ``(B, C)``.
        logits_teacher_strong: ``(B, C)``, or ``None``.
        temperature: T > 0.
        kd_weight: w.
        corrected: Whether the mask selects the samples of which the teacher is less confident, and the terms at 2 and 6
            read the strong views.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> weak, strong = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> mlld_instance_loss(weak, strong, torch.eye(2, 3), torch.eye(2, 3))
        tensor(0.7912)
    """
    scale = _sample_scale(logits_teacher_weak, corrected)
    weak = [_kd(logits_student_weak, logits_teacher_weak, t) for t in (temperature, 3.0, 5.0, 2.0, 6.0)]
    total = torch.stack([(scale * rows).mean() for rows in weak]).sum()
    if logits_student_strong is not None and logits_teacher_strong is not None:
        strong = [_kd(logits_student_strong, logits_teacher_strong, t) for t in (temperature, 3.0, 5.0)]
        again = [_kd(logits_student_strong, logits_teacher_strong, t) for t in (2.0, 6.0)] if corrected else weak[-2:]
        total = total + torch.stack([*strong, *again]).mean(1).sum()
    return kd_weight * total


@in_full_precision
def mlld_class_loss(
    logits_student_weak: Tensor,
    logits_student_strong: Tensor | None,
    logits_teacher_weak: Tensor,
    logits_teacher_strong: Tensor | None,
    *,
    temperature: float = 4.0,
    kd_weight: float = 0.9,
    corrected: bool = False,
) -> Tensor:
    """Compute the sum of :func:`mlld_class_term_loss` over the temperatures T, 3, 5, 2 and 6.

    Only the weak views count: the authors' code computes the terms of the strong ones and drops them. Its mask of the
    less confident half of the classes selects nothing, as in :func:`mlld_instance_loss`.

    Args:
        logits_student_weak: Logits of a weakly augmented view, ``(B, C)``.
        logits_student_strong: Not read.
        logits_teacher_weak: ``(B, C)``.
        logits_teacher_strong: Not read.
        temperature: T > 0.
        kd_weight: Factor of the sum.
        corrected: Whether the mask selects classes that the teacher gives less probability in the batch.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> mlld_class_loss(torch.zeros(2, 3), None, torch.eye(2, 3), None)
        tensor(0.0057)
    """
    scale = (
        less_confident(logits_teacher_weak.softmax(1).sum(0))
        if corrected
        else masked_share(logits_teacher_weak.shape[1])
    )
    terms = (_class_errors(logits_student_weak, logits_teacher_weak, t) for t in (temperature, 3.0, 5.0, 2.0, 6.0))
    return kd_weight * _sum(scale * rows for rows in terms)


@in_full_precision
def mlld_batch_loss(
    logits_student_weak: Tensor,
    logits_student_strong: Tensor | None,
    logits_teacher_weak: Tensor,
    logits_teacher_strong: Tensor | None,
    *,
    temperature: float = 4.0,
    kd_weight: float = 0.9,
    corrected: bool = False,
) -> Tensor:
    """Compute the sum of :func:`mlld_batch_term_loss` over the temperatures T, 3, 5, 2 and 6.

    Only the weak views count, and the mask selects nothing, as in :func:`mlld_class_loss`.

    Args:
        logits_student_weak: Logits of a weakly augmented view, ``(B, C)``.
        logits_student_strong: Not read.
        logits_teacher_weak: ``(B, C)``.
        logits_teacher_strong: Not read.
        temperature: T > 0.
        kd_weight: Factor of the sum.
        corrected: Whether the mask selects the samples of which the teacher is less confident.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> mlld_batch_loss(torch.zeros(2, 3), None, torch.eye(2, 3), None)
        tensor(0.0003)
    """
    scale = _sample_scale(logits_teacher_weak, corrected)
    terms = (_batch_errors(logits_student_weak, logits_teacher_weak, t) for t in (temperature, 3.0, 5.0, 2.0, 6.0))
    return kd_weight * _sum(scale * rows for rows in terms)


@in_full_precision
def mlld_loss(
    logits_student_weak: Tensor,
    logits_student_strong: Tensor | None,
    logits_teacher_weak: Tensor,
    logits_teacher_strong: Tensor | None,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    corrected: bool = False,
) -> Tensor:
    """Compute the whole published objective: cross-entropy of both views, and the three sums.

    Args:
        logits_student_weak: Logits of a weakly augmented view, ``(B, C)``.
        logits_student_strong: Logits of a strongly augmented view of the same samples; ``None`` leaves out its terms.
        logits_teacher_weak: ``(B, C)``.
        logits_teacher_strong: ``(B, C)``, or ``None``.
        target: Class indices ``(B,)``, -1 where a row is unlabelled, or class probabilities ``(B, C)``.
        temperature: T > 0.
        ce_weight: Factor of the cross-entropies.
        kd_weight: Factor of the three sums.
        corrected: Whether the slips named in :func:`mlld_instance_loss` are corrected.

    Returns:
        A scalar.

    Example:
        >>> mlld_loss(torch.zeros(2, 3), None, torch.eye(2, 3), None, torch.tensor([0, 1]))
        tensor(0.3796)
    """
    student = [z for z in (logits_student_weak, logits_student_strong) if z is not None]
    logits = (logits_student_weak, logits_student_strong, logits_teacher_weak, logits_teacher_strong)
    sums = [
        term(*logits, temperature=temperature, kd_weight=kd_weight, corrected=corrected)
        for term in (mlld_instance_loss, mlld_class_loss, mlld_batch_loss)
    ]
    return ce_weight * _sum(hard_target_loss(z, target) for z in student) + _sum(sums)


def _sample_scale(teacher: Tensor, corrected: bool) -> Tensor | float:
    return less_confident(teacher.softmax(1).amax(1)) if corrected else masked_share(len(teacher))


def _kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    rows = divergence(*((z / temperature).log_softmax(1) for z in (student, teacher)))
    return temperature**2 * rows


def _class_errors(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = ((z / temperature).softmax(1) for z in (student, teacher))
    return (q.T @ q - p.T @ p).square().sum(1)


def _batch_errors(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = ((z / temperature).softmax(1) for z in (student, teacher))
    return (q @ q.T - p @ p.T).square().sum(1)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack([term.mean() for term in terms]).sum()


class MLLDLoss(DistillationLoss):
    """Multi-level logit distillation (MLLD): the three sums of :func:`mlld_loss`, over the batch of all ranks.

    Y. Jin, J. Wang, D. Lin: Multi-Level Logit Distillation, CVPR 2023,
    https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html;
    authors' code: https://github.com/Jin-Ying/Multi-Level-Logit-Distillation

    The paper trains on a weakly and a strongly augmented view of each sample, which a data module with ``second_view``
    yields. With one view of each, the terms of the strong view are left out: of 10 terms of KD five stay, at half
    their weight, and all others.

    Args:
        weight: Factor of the term in the weighted sum; 0.9 as released, beside a weight of 0.1 on the labels (0.5 and
            0.5 on ImageNet).
        temperature: T > 0, beside 2, 3, 5 and 6; 4 as released (1 on ImageNet).
        two_views: Whether a batch has 2B rows, first all weak and then all strong views.
        corrected: Whether the released code's slips are corrected, see :func:`mlld_instance_loss`.
        gather: Whether to compare the samples of the batches of all ranks, and not of each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature is not above 0.

    Example:
        >>> student, teacher = Outputs(torch.rand(4, 10)), Outputs(torch.rand(4, 10))
        >>> MLLDLoss()(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 0.9,
        temperature: float = 4.0,
        two_views: bool = False,
        corrected: bool = False,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.two_views = two_views
        self.views = 2 if two_views else 1
        self.corrected = corrected
        self.gather = gather

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        parts = [*student.logits.chunk(self.views), *teacher.logits.detach().chunk(self.views)]
        gathered = all_gather_grad(*parts, active=self.gather and self.training)
        weak, strong = gathered[:: self.views], gathered[1::2] if self.two_views else (None, None)
        logits = (weak[0], strong[0], weak[1], strong[1])
        terms = [
            term(*logits, temperature=self.temperature, kd_weight=1.0, corrected=self.corrected)
            for term in (mlld_instance_loss, mlld_class_loss, mlld_batch_loss)
        ]
        return torch.stack(terms).sum()
