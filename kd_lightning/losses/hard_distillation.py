"""Hard-label distillation: the teacher's most probable class as the label."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def hard_distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Compute the cross-entropy with the teacher's most probable classes.

    .. math:: -\frac{1}{B} \sum_b \log \mathrm{softmax}(z^s_b)_{y_b}, \qquad y_b = \arg\max_c z^t_{bc}

    A shift of any row, and a positive factor on the teacher's, change nothing.

    Args:
        student_logits: ``(B, C)``.
        teacher_logits: ``(B, C)``.

    Returns:
        A scalar >= 0.

    Example:
        >>> import torch
        >>> hard_distillation_loss(torch.zeros(2, 4), torch.eye(2, 4))
        tensor(1.3863)
    """
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


class HardDistillationLoss(DistillationLoss):
    """Hard-label distillation, as DeiT's distillation token learns: :func:`hard_distillation_loss`.

    H. Touvron et al.: Training data-efficient image transformers & distillation through attention, ICML 2021,
    https://arxiv.org/abs/2012.12877; authors' code: https://github.com/facebookresearch/deit

    For a student with a distillation token, see :class:`HeadLoss`; its soft form is :class:`SoftTargetLoss` there.

    Args:
        weight: 0.5 as released, beside a weight of 0.5 on the labels.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> import torch
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> HardDistillationLoss()(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(self, *, weight: float = 0.5, warmup_epochs: int = 0) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        return hard_distillation_loss(student.logits, teacher.logits.detach())
