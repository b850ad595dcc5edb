"""Relational knowledge distillation: the distances and angles between the images of a batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._pairs import vector_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss

_CHUNK = 2**22
"""Number of cosines of angles held at once, 16 MiB in float32."""


@in_full_precision
def relational_loss(
    student_features: Tensor, teacher_features: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    r"""Compute the Huber differences of distances between pairs and of angles in triplets.

    .. math:: \frac{w_d}{B^2} \sum_{ij} h\big( d^s_{ij}, d^t_{ij} \big)
              + \frac{w_a}{B^3} \sum_{ijk} h\big( \cos \angle^s_{jik}, \cos \angle^t_{jik} \big)

    Distances are divided by their mean over pairs, and the angle jik has its vertex at i. A shift, a rotation, or a
    factor on all features changes nothing. Angles are computed for some vertices at a time and again in the backward
    pass, so that memory grows with :math:`B^2` and not with :math:`B^3`.

    Args:
        student_features: ``(B, ...)``, flattened to vectors.
        teacher_features: ``(B, ...)``.
        distance_weight: :math:`w_d` >= 0.
        angle_weight: :math:`w_a` >= 0.

    Returns:
        A scalar >= 0, and 0 where distances and angles agree.

    Example:
        >>> vectors = torch.rand(4, 8)
        >>> relational_loss(vectors, 2 * vectors.flip(1) + 1).item() < 1e-6
        True
    """
    student, teacher = student_features.flatten(1), teacher_features.flatten(1)
    distance = F.smooth_l1_loss(_distances(student), _distances(teacher))
    return distance_weight * distance + angle_weight * _angle_loss(student, teacher)


def _distances(rows: Tensor) -> Tensor:
    # differences, since inner products of close rows cancel; equal rows count as 1e-6 apart, as released
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-6)
    distances = distances.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), 0.0)
    return distances / (distances.sum() / max(len(rows) * (len(rows) - 1), 1)).clamp(min=1e-6)


def _angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    count = len(student)
    size = max(1, _CHUNK // max(count**2, count * max(student.shape[1], teacher.shape[1])))
    if size >= count:
        return _angle_difference(student, teacher, 0, count) / count**3
    parts = [
        checkpoint(_angle_difference, student, teacher, start, min(start + size, count), use_reentrant=False)
        for start in range(0, count, size)
    ]
    return torch.stack(parts).sum() / count**3


def _angle_difference(student: Tensor, teacher: Tensor, start: int, end: int) -> Tensor:
    return F.smooth_l1_loss(_cosines(student, start, end), _cosines(teacher, start, end), reduction="sum")


def _cosines(rows: Tensor, start: int, end: int) -> Tensor:
    """Return the cosines of the angles at vertices ``start`` to ``end``, ``(end - start, B, B)``."""
    arms = normalize(rows[None] - rows[start:end, None], dim=2)
    return arms @ arms.transpose(1, 2)


class RelationalLoss(DistillationLoss):
    """Relational knowledge distillation (RKD): :func:`relational_loss`, summed over the layers.

    W. Park et al.: Relational Knowledge Distillation, CVPR 2019, https://arxiv.org/abs/1904.05068;
    authors' code: https://github.com/lenscloth/RKD

    Args:
        weight: Factor of the term in the weighted sum.
        distance_weight: Weight of the distances; 25 in the paper and in the CRD benchmark.
        angle_weight: Weight of the angles; 50 in the paper and in the CRD benchmark.
        student_layers: The pooled embedding by default, as in the CRD benchmark
            (https://github.com/HobbitLong/RepDistiller). Maps ``(B, C, H, W)`` are averaged over their pixels.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> teacher = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 32)})
        >>> RelationalLoss()(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        student_layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if not (distance_weight >= 0 and angle_weight >= 0):
            raise UserError(f"distance_weight and angle_weight must be >= 0, got {distance_weight} and {angle_weight}.")
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
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
        terms = [
            relational_loss(s, t, distance_weight=self.distance_weight, angle_weight=self.angle_weight)
            for s, t in pairs
        ]
        return torch.stack(terms).sum()
