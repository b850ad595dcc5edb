"""Similarity-preserving distillation: which images of a batch the networks find alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._pairs import feature_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def similarity_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Compute the squared difference of both networks' similarity matrices of a batch.

    .. math:: \frac{1}{B^2} \| \hat G^s - \hat G^t \|_F^2, \qquad \hat G_{b \cdot} = G_{b \cdot} / \|G_{b \cdot}\|,
              \quad G = F F^\top, \; F \in \mathbb{R}^{B \times n}

    A rotation of the features, or a factor on all of them, changes nothing.

    Args:
        student_features: ``(B, ...)``, flattened to ``(B, n)``.
        teacher_features: ``(B, ...)``.

    Returns:
        A scalar >= 0, and 0 where both find the same images alike.

    Example:
        >>> maps = torch.rand(4, 8, 3, 3)
        >>> similarity_loss(maps, 2 * maps.flip(1)).item() < 1e-9
        True
    """
    return (_similarities(student_features) - _similarities(teacher_features)).square().mean()


def _similarities(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return normalize(rows @ rows.T)


class SimilarityLoss(DistillationLoss):
    """Similarity-preserving distillation (SP): :func:`similarity_loss`, summed over the layers.

    F. Tung, G. Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, https://arxiv.org/abs/1907.09682;
    the form is that of the CRD benchmark, https://github.com/HobbitLong/RepDistiller

    Args:
        weight: 3000, the paper's gamma.
        student_layers: The last map by default, as in the CRD benchmark.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"layer3": torch.rand(4, 8, 8, 8)})
        >>> teacher = Outputs(torch.rand(4, 10), {"layer3": torch.rand(4, 32, 4, 4)})
        >>> SimilarityLoss()(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 3000.0,
        student_layers: Sequence[str] = ("layer3",),
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
        feature_pairs(self, student, teacher)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        pairs = [
            all_gather_grad(*pair, active=self.gather and self.training)
            for pair in feature_pairs(self, student, teacher)
        ]
        return torch.stack([similarity_loss(s, t) for s, t in pairs]).sum()
