"""SDD: a loss on logits also for regions of the image, which weigh more where they contradict the whole."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._labels import (
    class_indices,
    class_or_not,
    divergence,
    label_column,
    label_cross_entropy,
    mean_of_labelled,
    other_classes,
)
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses._regions import RegionLoss


@in_full_precision
def sdd_kd_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""Compute the divergence of the softened student from the softened teacher for each region.

    .. math:: \frac{1}{N B} \sum_{b, n} w_{bn} T^2 \,
              \mathrm{KL}(\mathrm{softmax}(z^t_{bn} / T) \,\|\, \mathrm{softmax}(z^s_{bn} / T))

    with weights w = 2 where the teacher is right about the region and wrong about the whole image, or the reverse, and
    1 otherwise.

    Args:
        logits_student: Logits of N regions, of which the first is the whole image, ``(B, C, N)``.
        logits_teacher: ``(B, C, N)``.
        target: Class indices ``(B,)`` or class probabilities ``(B, C)``, of which the largest counts; an unlabelled row
            (-1) has the weight 1.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[2.0, -2.0], [0.0, 0.0]]])
        >>> sdd_kd_loss(student, teacher, torch.tensor([0]), temperature=1.0)
        tensor(0.4917)
    """
    student, teacher, _, weights = _rows(logits_student, logits_teacher, class_indices(target))
    rows = divergence(*(F.log_softmax(z / temperature, dim=1) for z in (student, teacher)))
    return temperature**2 * (weights * rows).mean()


@in_full_precision
def sdd_dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Compute :func:`~kd_lightning.losses.decoupled_loss` for each region, weighted as in :func:`sdd_kd_loss`.

    Args:
        logits_student: Logits of N regions, of which the first is the whole image, ``(B, C, N)``.
        logits_teacher: ``(B, C, N)``.
        target: Class indices ``(B,)``, where -1 leaves a row out, or class probabilities ``(B, C)``, of which the
            largest counts.
        alpha: Weight of the label's class.
        beta: Weight of the other classes.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree or no row has a label.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3, 2), torch.tensor([[[2.0, -2.0], [0.0, 0.0], [1.0, 0.0]]])
        >>> sdd_dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0)
        tensor(0.7715)
    """
    student, teacher, labels, weights = _rows(logits_student, logits_teacher, class_indices(target))
    label = label_column(labels)
    student, teacher = student / temperature, teacher / temperature
    rows = alpha * divergence(class_or_not(student, label), class_or_not(teacher, label))
    rows = rows + beta * divergence(*(F.log_softmax(other_classes(z, label), dim=1) for z in (student, teacher)))
    return temperature**2 * mean_of_labelled(weights * rows, labels)


@in_full_precision
def sdd_nkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
    corrected: bool = False,
) -> Tensor:
    """Compute :func:`~kd_lightning.losses.nkd_loss` for each region, weighted as in :func:`sdd_kd_loss`.

    The authors' code does not remove the label from the second term, which NKD sums over the other classes: its mask
    sets a one in place of a zero. That is the default, with which the paper's figures were made.

    Args:
        logits_student: Logits of N regions, of which the first is the whole image, ``(B, C, N)``.
        logits_teacher: ``(B, C, N)``.
        target: Class indices ``(B,)``, where -1 leaves a row out, or class probabilities ``(B, C)``, of which the
            largest counts.
        temperature: T > 0, of the second term.
        gamma: Weight of the second term.
        corrected: Whether the second term leaves out the label, as in NKD.

    Returns:
        A scalar >= 0, and 0 where no row has a label.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[2.0, -2.0], [0.0, 0.0]]])
        >>> sdd_nkd_loss(student, teacher, torch.tensor([0]))
        tensor(1.9475)
    """
    student, teacher, labels, weights = _rows(logits_student, logits_teacher, class_indices(target))
    label = label_column(labels)
    labelled = label_cross_entropy(student, teacher, label)
    compared = [other_classes(z, label) if corrected else z for z in (student, teacher)]
    student, teacher = (z / temperature for z in compared)
    others = -(teacher.softmax(1) * F.log_softmax(student, dim=1)).sum(1)
    return mean_of_labelled(weights * (labelled + gamma * temperature**2 * others), labels)


def _rows(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits of all regions as rows ``(B * N, C)``, and the label and the weight of each, ``(B * N,)``."""
    regions = teacher.shape[2]
    right = teacher.argmax(1) == labels[:, None]
    contradicts = (right != right[:, :1]) & (labels[:, None] >= 0)
    rows = [z.transpose(1, 2).flatten(0, 1) for z in (student, teacher)]
    weights = (1 + contradicts.to(student.dtype)).flatten()
    return rows[0], rows[1], labels.repeat_interleave(regions, output_size=labels.numel() * regions), weights


class SDDKDLoss(RegionLoss):
    """Scale-decoupled distillation (SDD) over KD: :func:`sdd_kd_loss`, without the whole image's KD beside it.

    S. Wei, C. Luo, Y. Luo: Scale Decoupled Distillation, CVPR 2024, https://arxiv.org/abs/2403.13512; authors' code:
    https://github.com/shicaiwei123/SDD-CVPR2024

    Each network's own classifier is applied to the regions of its last map; the loss refers to it and has no weights.
    Unlike the released code nothing needs to be replaced by 0, since it stays finite.

    Args:
        weight: Factor of the term in the weighted sum; 0.9 as released, beside a weight of 0.1 on the labels.
        student_layers: The last map, whose mean over the pixels the classifier takes.
        teacher_layers: The same of the teacher; the same name by default.
        temperature: T > 0; 4 as released.
        pools: Sides of the grids of regions, the first of them 1; 1, 2 and 4 as released for CIFAR-100.
        warmup_epochs: Epochs over which the weight rises linearly to its value; 0 as released.

    Raises:
        ValueError: If the temperature is not above 0, more than one layer is named, ``pools`` do not start with 1, or
            a network has no linear classifier that takes the layer's channels.

    Example:
        >>> import torch
        >>> from kd_lightning.features import Outputs
        >>> from kd_lightning.networks import resnet20, resnet8x4
        >>> student = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 64, 8, 8)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 256, 8, 8)})
        >>> loss = SDDKDLoss()
        >>> loss.build(student, teacher, student_network=resnet20(), teacher_network=resnet8x4())
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 0.9,
        student_layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        temperature: float = 4.0,
        pools: Sequence[int] = (1, 2, 4),
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight,
            student_layers=student_layers,
            teacher_layers=teacher_layers,
            pools=pools,
            warmup_epochs=warmup_epochs,
        )
        check_positive(temperature=temperature)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Compute :func:`sdd_kd_loss`."""
        return sdd_kd_loss(student, teacher, labels, temperature=self.temperature)


class SDDDKDLoss(RegionLoss):
    """Scale-decoupled distillation (SDD) over decoupled KD: :func:`sdd_dkd_loss`. For the paper see :class:`SDDKDLoss`.

    Args:
        weight: Factor of the term in the weighted sum; 1 as released, beside a weight of 1 on the labels.
        student_layers: The last map, whose mean over the pixels the classifier takes.
        teacher_layers: The same of the teacher; the same name by default.
        alpha: Weight of the label's class; 1 as released.
        beta: Weight of the other classes; 8 as released (2 or 6 in some pairs; 0.5 for ResNet-34 to ResNet-18 and 2
            for ResNet-50 to MobileNetV2 on ImageNet).
        temperature: T > 0; 4 as released (1 on ImageNet).
        pools: Sides of the grids of regions, the first of them 1; 1, 2 and 4 as released (1 and 2 for ResNet-34 to
            ResNet-18 on ImageNet).
        warmup_epochs: Epochs over which the weight rises linearly to its value; 20 as released.

    Raises:
        ValueError: As of :class:`SDDKDLoss`, or if a weight is negative.

    Example:
        >>> import torch
        >>> from kd_lightning.features import Outputs
        >>> from kd_lightning.networks import resnet20
        >>> outputs = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 64, 8, 8)})
        >>> loss = SDDDKDLoss()
        >>> loss.build(outputs, outputs, student_network=resnet20(), teacher_network=resnet20())
        >>> loss(outputs, outputs, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        pools: Sequence[int] = (1, 2, 4),
        warmup_epochs: int = 20,
    ) -> None:
        super().__init__(
            weight=weight,
            student_layers=student_layers,
            teacher_layers=teacher_layers,
            pools=pools,
            warmup_epochs=warmup_epochs,
        )
        check_positive(temperature=temperature)
        if not (alpha >= 0 and beta >= 0):
            raise UserError(f"alpha and beta must be >= 0, got {alpha} and {beta}.")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Compute :func:`sdd_dkd_loss`."""
        return sdd_dkd_loss(student, teacher, labels, alpha=self.alpha, beta=self.beta, temperature=self.temperature)
