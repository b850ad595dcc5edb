"""Probabilistic knowledge transfer: how probable it is that an image of the batch picks another one as neighbour."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._pairs import vector_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss

_EPSILON = 1e-7


@in_full_precision
def probabilistic_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Compute the divergence of both networks' neighbour probabilities.

    .. math:: \frac{1}{B^2} \sum_{ij} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \qquad
              p_{ij} = \frac{k_{ij}}{\sum_l k_{il}}, \quad k_{ij} = \frac{\cos(f_i, f_j) + 1}{2}, \quad
              \epsilon = 10^{-7}

    A rotation of the features, or a factor on any of them, changes nothing.

    Args:
        student_features: ``(B, ...)``, flattened to vectors.
        teacher_features: ``(B, ...)``.

    Returns:
        A scalar >= 0 (up to rounding), and 0 where both find the same neighbours.

    Example:
        >>> vectors = torch.rand(4, 8)
        >>> abs(probabilistic_loss(vectors, 2 * vectors.flip(1)).item()) < 1e-6
        True
    """
    student, teacher = _neighbours(student_features), _neighbours(teacher_features)
    return (teacher * ((teacher + _EPSILON) / (student + _EPSILON)).log()).mean()


def _neighbours(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + _EPSILON)
    kernel: Tensor = ((rows @ rows.T + 1) / 2).clamp(min=0)  # a cosine may be rounded below -1
    return kernel / kernel.sum(1, keepdim=True)


class ProbabilisticLoss(DistillationLoss):
    """Probabilistic knowledge transfer (PKT): :func:`probabilistic_loss`, summed over the layers.

    N. Passalis, A. Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018,
    https://arxiv.org/abs/1803.10837; authors' code: https://github.com/passalis/probabilistic_kt

    Args:
        weight: 30000, as in the CRD benchmark (https://github.com/HobbitLong/RepDistiller).
        student_layers: The pooled embedding by default, as in the CRD benchmark. Maps ``(B, C, H, W)`` are averaged
            over their pixels.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> teacher = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 32)})
        >>> ProbabilisticLoss()(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 30000.0,
        student_layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        self.gather = gather

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` for layers that give one number for an image."""
        vector_pairs(self, student, teacher)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        pairs = [
            all_gather_grad(*pair, active=self.gather and self.training)
            for pair in vector_pairs(self, student, teacher)
        ]
        return torch.stack([probabilistic_loss(s, t) for s, t in pairs]).sum()
