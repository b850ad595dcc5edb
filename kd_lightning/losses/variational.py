"""Variational information distillation: the student predicts the teacher's map with a learned uncertainty."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._pairs import map_pairs, match_dtype, require_built, same_size
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss

_EPSILON = 1e-5
"""Smallest variance."""


@in_full_precision
def variational_loss(means: Tensor, teacher_features: Tensor, scales: Tensor) -> Tensor:
    r"""Compute the mean negative log-likelihood of the teacher's map under a Gaussian with one variance per channel.

    .. math:: \frac{1}{BCHW} \sum_{bchw} \frac{(t_{bchw} - \mu_{bchw})^2}{2 \sigma_c^2} + \log \sigma_c,
              \qquad \sigma_c^2 = \log(1 + e^{\alpha_c}) + 10^{-5}

    The constant :math:`\log \sqrt{2 \pi}` is left out, so the value may be negative.

    Args:
        means: The student's predictions, ``(B, C, H, W)``.
        teacher_features: The same shape.
        scales: :math:`\alpha`, unconstrained, ``(C,)``.

    Example:
        >>> variational_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor([0.5413]))
        tensor(0.5000)
    """
    variances = (F.softplus(scales) + _EPSILON)[None, :, None, None]
    return ((means - teacher_features).square() / variances + variances.log()).mean() / 2


class VariationalLoss(DistillationLoss):
    """Variational information distillation (VID): :func:`variational_loss`, summed over the layers.

    S. Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019,
    https://arxiv.org/abs/1904.05835; authors' code: https://github.com/ssahn0215/variational-information-distillation

    As in the CRD benchmark (https://github.com/HobbitLong/RepDistiller) the mean is three 1x1 convolutions of the
    student's map with ReLUs between them, as wide as the teacher's map, and every variance starts at 5. Both train
    with the student. Where resolutions differ, the larger map is average-pooled. ``(B, C)`` counts as a 1x1 map.

    Args:
        weight: 1, as in the CRD benchmark.
        student_layers: The stages of a CIFAR ResNet by default.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        initial_variance: Initial variance of every channel, above 1e-5.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the initial variance is too small.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 8, 16, 16)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 32, 8, 8)})
        >>> loss = VariationalLoss(student_layers=["layer3"])
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        teacher_layers: Sequence[str] | None = None,
        initial_variance: float = 5.0,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if not initial_variance > _EPSILON:
            raise UserError(f"initial_variance must be above {_EPSILON}, got {initial_variance}.")
        self.initial_variance = initial_variance
        self.means = nn.ModuleList()
        self.scales = nn.ParameterList()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create the means and variances for each pair of layers."""
        channels = [(s.shape[1], t.shape[1]) for s, t in map_pairs(self, student, teacher)]
        # the inverse of softplus, written so that a large variance does not overflow
        variance = self.initial_variance - _EPSILON
        scale = variance + math.log(-math.expm1(-variance))
        self.means = nn.ModuleList(_mean(*pair) for pair in channels)
        self.scales = nn.ParameterList(torch.full((width,), scale) for _, width in channels)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        pairs = [same_size(s, t) for s, t in map_pairs(self, student, teacher)]
        parts = zip(require_built(self, self.means), self.scales, pairs, strict=True)
        return torch.stack(
            [variational_loss(mean(match_dtype(mean, s)), t, scale) for mean, scale, (s, t) in parts]
        ).sum()


def _mean(student_channels: int, teacher_channels: int) -> nn.Sequential:
    def conv(channels: int) -> nn.Conv2d:
        return nn.Conv2d(channels, teacher_channels, kernel_size=1, bias=False)

    return nn.Sequential(conv(student_channels), nn.ReLU(), conv(teacher_channels), nn.ReLU(), conv(teacher_channels))
