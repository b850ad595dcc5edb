"""Attention transfer: where in the image the networks are active."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._pairs import map_pairs, same_size
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def attention_loss(student_features: Tensor, teacher_features: Tensor, *, power: int = 2) -> Tensor:
    r"""Compute the mean squared difference of the normalised attention maps.

    .. math:: \frac{1}{BHW} \sum_{b} \Big\| \frac{a^s_b}{\|a^s_b\|} - \frac{a^t_b}{\|a^t_b\|} \Big\|^2,
              \qquad a_b = \frac{1}{C} \sum_c F_{bc}^p \in \mathbb{R}^{HW}

    Scaling either side by a factor changes nothing. The larger map is average-pooled to the smaller one's size.

    Args:
        student_features: ``(B, C, H, W)``.
        teacher_features: ``(B, C', H', W')``.
        power: p >= 1. With an even one, or behind a ReLU, this is the paper's power of the absolute value.

    Returns:
        A scalar >= 0, and 0 where both attend to the same places.

    Example:
        >>> maps = torch.rand(2, 8, 4, 4)
        >>> attention_loss(maps, torch.cat([maps, maps], dim=1)).item() < 1e-9
        True
    """
    student_features, teacher_features = same_size(student_features, teacher_features)
    return F.mse_loss(_attention(student_features, power), _attention(teacher_features, power))


def _attention(features: Tensor, power: int) -> Tensor:
    return normalize(features.pow(power).mean(1).flatten(1))


class AttentionLoss(DistillationLoss):
    """Attention transfer (AT): :func:`attention_loss`, summed over the layers.

    S. Zagoruyko, N. Komodakis: Paying More Attention to Attention: Improving the Performance of Convolutional Neural
    Networks via Attention Transfer, ICLR 2017, https://arxiv.org/abs/1612.03928;
    authors' code: https://github.com/szagoruyko/attention-transfer

    Args:
        weight: 1000, the authors' (and the CRD benchmark's) beta.
        student_layers: The stages of a CIFAR ResNet by default.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        power: p >= 1; 2 as published.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the power is below 1.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 8, 16, 16)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 32, 8, 8)})
        >>> AttentionLoss(student_layers=["layer3"])(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1000.0,
        student_layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        teacher_layers: Sequence[str] | None = None,
        power: int = 2,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if power < 1:
            raise UserError(f"power must be >= 1, got {power}.")
        self.power = power

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` for layers that give no maps."""
        map_pairs(self, student, teacher, vectors=False)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        pairs = map_pairs(self, student, teacher, vectors=False)
        return torch.stack([attention_loss(s, t, power=self.power) for s, t in pairs]).sum()
