"""FitNets: the student's map, through a learned regressor, equals the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._pairs import SafeBatchNorm2d, map_pairs, match_dtype, require_built, same_size
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Compute the mean squared difference of two feature tensors.

    .. math:: \frac{1}{n} \sum_i (f^s_i - f^t_i)^2

    Args:
        student_features: Any shape, after the regressor.
        teacher_features: The same shape.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> hint_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0))
        tensor(4.)
    """
    if student_features.shape != teacher_features.shape:
        raise UserError(
            f"hint_loss compares features of one shape, got {tuple(student_features.shape)} of the student and "
            f"{tuple(teacher_features.shape)} of the teacher; map one to the other's shape first."
        )
    return (student_features - teacher_features).square().mean()


class HintLoss(DistillationLoss):
    """FitNets: :func:`hint_loss` after a learned 1x1 convolution, batch norm and ReLU, summed over the layers.

    A. Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015, https://arxiv.org/abs/1412.6550;
    authors' code: https://github.com/adri-romsor/FitNets. Here, as in the CRD benchmark
    (https://github.com/HobbitLong/RepDistiller), hint and labels train together and not in two stages.

    Where resolutions differ, the larger map is average-pooled before the regressor. ``(B, C)`` counts as a 1x1 map.

    Args:
        weight: 100, as in the CRD benchmark.
        student_layers: The middle layer by default, as in the CRD benchmark.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        regressor: Whether a regressor is learned. Without one the maps themselves are compared, which need equal
            channels (SimKD: the student's projector and the teacher's last map).
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer2": torch.rand(2, 8, 16, 16)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer2": torch.rand(2, 32, 8, 8)})
        >>> loss = HintLoss()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 100.0,
        student_layers: Sequence[str] = ("layer2",),
        teacher_layers: Sequence[str] | None = None,
        regressor: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        self.regressor = regressor
        self.regressors = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a regressor for each pair of layers."""
        channels = [(s.shape[1], t.shape[1]) for s, t in map_pairs(self, student, teacher)]
        if self.regressor:
            self.regressors = nn.ModuleList(_regressor(*pair) for pair in channels)
            return
        for name, (student_channels, teacher_channels) in zip(self.student_layers, channels, strict=True):
            if student_channels != teacher_channels:
                raise UserError(
                    f"HintLoss without a regressor compares maps of equal channels, but layer {name!r} has "
                    f"{student_channels} and the teacher's {teacher_channels}; set regressor=True."
                )

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        pairs = [same_size(s, t) for s, t in map_pairs(self, student, teacher)]
        if self.regressor:
            regressors = require_built(self, self.regressors)
            pairs = [(part(match_dtype(part, s)), t) for part, (s, t) in zip(regressors, pairs, strict=True)]
        return torch.stack([hint_loss(s, t) for s, t in pairs]).sum()


def _regressor(student_channels: int, teacher_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
    return nn.Sequential(conv, SafeBatchNorm2d(teacher_channels), nn.ReLU())
