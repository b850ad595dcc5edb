"""Correlation congruence: how the errors of neighbouring samples go together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._pairs import match_dtype, require_built, vector_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def correlation_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Compute the product of the absolute differences of each sample and the next one.

    .. math:: \frac{1}{B - 1} \sum_{b=1}^{B-1} \sum_i \delta_{bi} \, \delta_{b+1,i}, \qquad \delta = |f^s - f^t|

    This is what the CRD benchmark released for the method; it depends on the order within the batch.

    Args:
        student_features: ``(B, ...)``, flattened to ``(B, n)``.
        teacher_features: The same shape.

    Returns:
        A scalar >= 0, and 0 where both agree or B is 1.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> correlation_loss(torch.zeros(3, 4), torch.full((3, 4), 2.0))
        tensor(16.)
    """
    if student_features.shape != teacher_features.shape:
        raise UserError(
            f"correlation_loss compares features of one shape, got {tuple(student_features.shape)} of the student "
            f"and {tuple(teacher_features.shape)} of the teacher; map one to the other's shape first."
        )
    delta = (student_features - teacher_features).abs().flatten(1)
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


class CorrelationLoss(DistillationLoss):
    """Correlation congruence (CC): :func:`correlation_loss` of learned embeddings, summed over the layers.

    B. Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019, https://arxiv.org/abs/1904.01802;
    as released with the CRD benchmark, https://github.com/HobbitLong/RepDistiller

    Both networks' features pass through a learned linear layer to a common width; both layers train with the student.

    Args:
        weight: 0.02, as in the CRD benchmark.
        student_layers: The pooled embedding by default, as in the CRD benchmark. Maps ``(B, C, H, W)`` are averaged
            over their pixels.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        dimensions: Common width of the embeddings; 128, as in the CRD benchmark.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If ``dimensions`` is below 1.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> teacher = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 32)})
        >>> loss = CorrelationLoss()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 0.02,
        student_layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        dimensions: int = 128,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if dimensions < 1:
            raise UserError(f"dimensions must be >= 1, got {dimensions}.")
        self.dimensions = dimensions
        self.gather = gather
        self.student_embeddings = nn.ModuleList()
        self.teacher_embeddings = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create two linear layers for each pair of layers."""
        pairs = vector_pairs(self, student, teacher)
        self.student_embeddings = nn.ModuleList(nn.Linear(s.shape[1], self.dimensions) for s, _ in pairs)
        self.teacher_embeddings = nn.ModuleList(nn.Linear(t.shape[1], self.dimensions) for _, t in pairs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        embeddings = zip(require_built(self, self.student_embeddings), self.teacher_embeddings, strict=True)
        pairs = zip(embeddings, vector_pairs(self, student, teacher), strict=True)
        embedded = [(a(match_dtype(a, s)), b(match_dtype(b, t))) for (a, b), (s, t) in pairs]
        terms = [correlation_loss(*all_gather_grad(*pair, active=self.gather and self.training)) for pair in embedded]
        return torch.stack(terms).sum()
