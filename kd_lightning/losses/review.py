"""ReviewKD: fused student stages are compared with the teacher's, level by level of a pyramid."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._pairs import SafeBatchNorm2d, map_pairs, match_dtype, require_built
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def hierarchical_context_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Compute the mean squared difference of two maps at full size and average-pooled to 4x4, 2x2 and 1x1.

    .. math:: \frac{\sum_l w_l \, \mathrm{MSE}(P_l(f^s), P_l(f^t))}{\sum_l w_l},
              \qquad w = 1, \tfrac12, \tfrac14, \tfrac18

    Only levels smaller than the map's height are used, and the weight halves at every level used.

    Args:
        student_features: ``(B, C, H, W)``.
        teacher_features: The same shape.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Raises:
        ValueError: If the shapes differ or are not those of maps.

    Example:
        >>> hierarchical_context_loss(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
        tensor(1.)
    """
    if student_features.shape != teacher_features.shape or student_features.dim() != 4:
        raise UserError(
            f"hierarchical_context_loss compares maps (B, C, H, W) of one shape, got {tuple(student_features.shape)} "
            f"of the student and {tuple(teacher_features.shape)} of the teacher; map one to the other's shape first."
        )
    # pooling is linear, so the difference is pooled once
    difference = student_features - teacher_features
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for level in (4, 2, 1):
        if level < difference.shape[2]:
            weight /= 2
            total = total + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
            weights += weight
    return total / weights


class ReviewLoss(DistillationLoss):
    """ReviewKD: :func:`hierarchical_context_loss` of the fused stages, summed over the layers.

    P. Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021, https://arxiv.org/abs/2104.09044;
    authors' code: https://github.com/dvlab-research/ReviewKD

    From the deepest layer to the shallowest, each student map is reduced to the common width (the deepest map's
    channels, at most 512), mixed by attention with what came from below it, and expanded to the teacher's channels
    and size. The released code reads the stages before their last ReLU; here the layers' outputs are compared.

    Args:
        weight: 5, as released for ResNet-32x4 to ResNet-8x4 on CIFAR-100.
        student_layers: From shallow to deep; the stages and the pooled embedding by default, as released.
            ``(B, C)`` counts as a 1x1 map.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        warmup_epochs: 20, as released.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer2": torch.rand(2, 8, 8, 8), "layer3": torch.rand(2, 16, 4, 4)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer2": torch.rand(2, 9, 8, 8), "layer3": torch.rand(2, 12, 4, 4)})
        >>> loss = ReviewLoss(student_layers=["layer2", "layer3"])
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 5.0,
        student_layers: Sequence[str] = ("layer1", "layer2", "layer3", "avgpool"),
        teacher_layers: Sequence[str] | None = None,
        warmup_epochs: int = 20,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        self.fusions = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a fusion for each pair of layers."""
        channels = [(s.shape[1], t.shape[1]) for s, t in map_pairs(self, student, teacher)]
        width = min(512, channels[-1][0])
        last = len(channels) - 1
        self.fusions = nn.ModuleList(_Fusion(s, width, t, fuse=i < last) for i, (s, t) in enumerate(channels))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        terms, deeper = [], None
        pairs = zip(require_built(self, self.fusions), map_pairs(self, student, teacher), strict=True)
        for fusion, (s, t) in reversed(list(pairs)):
            output, deeper = fusion(match_dtype(fusion, s), deeper, t.shape[2:])
            terms.append(hierarchical_context_loss(output, t))
        return torch.stack(terms).sum()


class _Fusion(nn.Module):
    """Attention-based fusion of one stage with the deeper ones."""

    def __init__(self, student_channels: int, width: int, teacher_channels: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student_channels, width, 1, bias=False), SafeBatchNorm2d(width))
        self.attend = nn.Conv2d(2 * width, 2, 1) if fuse else None
        self.expand = nn.Sequential(
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False), SafeBatchNorm2d(teacher_channels)
        )
        for part in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(part[0].weight, a=1)  # type: ignore[arg-type]  # a convolution's weight

    def forward(self, features: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the map in the teacher's channels and size, and the one with which the next stage is fused."""
        fused = self.reduce(features)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            own, other = self.attend(torch.cat([fused, deeper], dim=1)).sigmoid().split(1, dim=1)
            fused = fused * own + deeper * other
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.expand(fused), fused
