"""Correlation alignment: both domains have the same covariances."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._pairs import as_rows, domain_vectors
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import AlignmentLoss


@in_full_precision
def coral_loss(source_features: Tensor, target_features: Tensor) -> Tensor:
    r"""Compute the squared difference of the two domains' covariance matrices.

    .. math:: \frac{1}{4 d^2} \| C^s - C^t \|_F^2,
              \qquad C = \frac{1}{B - 1} \sum_b (f_b - \bar f)(f_b - \bar f)^\top \in \mathbb{R}^{d \times d}

    A shift of either domain, or a rotation of both, changes nothing. Transfer-Learning-Library takes the mean over
    :math:`d^2`, 4 times this, and adds the mean squared difference of the means.

    Args:
        source_features: ``(B, ...)``, flattened to vectors of d numbers.
        target_features: ``(B', ...)``.

    Returns:
        A scalar >= 0, and 0 where the covariances agree. One sample counts as one without variance.

    Raises:
        ValueError: If the widths differ.

    Example:
        >>> source, target = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
        >>> coral_loss(source, target)  # variances 2 and 8
        tensor(9.)
    """
    source, target = as_rows(source_features, target_features)
    return (_covariance(source) - _covariance(target)).square().mean() / 4


def _covariance(rows: Tensor) -> Tensor:
    centered = rows - rows.mean(0)
    return centered.T @ centered / max(len(rows) - 1, 1)


class CoralLoss(AlignmentLoss):
    """Deep correlation alignment (CORAL): :func:`coral_loss`, summed over the layers.

    B. Sun, K. Saenko: Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV 2016 workshops,
    https://arxiv.org/abs/1607.01719; authors' code: https://github.com/VisionLearningGroup/CORAL

    Args:
        weight: 1. The paper chooses it so that this term and the cross-entropy are about equal at the end of training.
        layers: The pooled embedding by default; the paper reads the last linear layer. Maps ``(B, C, H, W)`` are
            averaged over their pixels.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> source = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> target = Outputs(torch.rand(6, 10), {"avgpool": torch.rand(6, 8)})
        >>> CoralLoss()(source, target, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        layers: Sequence[str] = ("avgpool",),
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, layers=layers, warmup_epochs=warmup_epochs)
        self.gather = gather

    def check(self, source: Outputs, target: Outputs) -> None:
        """Raise a ``UserError`` for layers that give no vectors."""
        domain_vectors(self, source, target)

    def forward(self, source: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch of source and target, see :class:`AlignmentLoss`."""
        active = self.gather and self.training
        pairs = [
            all_gather_grad(s, active=active) + all_gather_grad(t, active=active)
            for s, t in domain_vectors(self, source, target)
        ]
        return torch.stack([coral_loss(s, t) for s, t in pairs]).sum()
