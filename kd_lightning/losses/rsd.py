"""RSD: each dimension of the student's embedding correlates with its own of the teacher's, and with no other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._normalize import standardize_columns
from kd_lightning.losses._pairs import SafeBatchNorm1d, match_dtype, require_built, vector_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def rsd_loss(embed_student: Tensor, embed_teacher: Tensor, *, kappa: float = 0.01) -> Tensor:
    r"""Compute the squared distance of the cross-correlation matrix from the identity, a sum and not a mean.

    .. math:: \sum_i (R_{ii} - 1)^2 + \kappa \sum_{i \ne j} R_{ij}^2, \qquad R = \frac{1}{B} \, {z^t}^\top z^s,
              \quad z = \frac{x - \mu}{\sigma + 10^{-5}}

    with mean and (biased) deviation of each column over the batch. A shift of any column changes nothing.

    Args:
        embed_student: ``(B, D)``.
        embed_teacher: ``(B, D)``.
        kappa: Weight of the correlations with other dimensions.

    Returns:
        A scalar >= 0. Columns that do not vary count as uncorrelated.

    Example:
        >>> embedding = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> rsd_loss(embedding, 3 * embedding).item() < 1e-6
        True
    """
    student, teacher = (standardize_columns(rows, deviation_eps=1e-5) for rows in (embed_student, embed_teacher))
    correlations = teacher.to(student).T @ student / len(student)
    own = correlations.diagonal()
    others = correlations.square().sum() - own.square().sum()
    return (own - 1).square().sum() + kappa * others


def rsd_projector_loss(
    embed_student: Tensor,
    embed_teacher: Tensor,
    *,
    projector: nn.Module,
    kappa: float = 0.01,
    expansion: int | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Compute ``weight`` times :func:`rsd_loss` of the projected student.

    Args:
        embed_student: ``(B, D')``.
        embed_teacher: ``(B, D)``.
        projector: Module from ``(B, D')`` to ``(B, D)``; as released linear, batch norm, GELU and linear, without
            biases of the linear layers.
        kappa: Weight of the correlations with other dimensions.
        expansion: Width of the projector's first layer over D', which is checked where it is given.
        weight: Factor of the loss.

    Raises:
        UserError: If the projector has another expansion.

    Example:
        >>> linear = nn.Linear(4, 6, bias=False)
        >>> rsd_projector_loss(torch.rand(8, 4), torch.rand(8, 6), projector=linear).shape
        torch.Size([])
    """
    first, width = next(projector.parameters()), embed_student.shape[1]
    if expansion is not None and len(first) != expansion * width:
        raise UserError(
            f"With expansion={expansion} and embeddings of {width} the projector starts with {expansion * width} "
            f"units, got {len(first)}; build it so, or leave expansion out."
        )
    return weight * rsd_loss(projector(match_dtype(projector, embed_student)), embed_teacher, kappa=kappa)


class RSDLoss(DistillationLoss):
    """RSD, redundancy suppression: :func:`rsd_projector_loss`, summed over the layers.

    W. Zhang et al.: Cross-Architecture Distillation Made Simple with Redundancy Suppression, ICCV 2025,
    https://arxiv.org/abs/2507.21844; authors' code: https://github.com/VISION-SJTU/RSD

    Released with 300 epochs on CIFAR-100, batches of 128 on each GPU, a cosine schedule and, for CNNs, a weight decay
    of 2e-3.

    Args:
        weight: 0.1, as released.
        student_layers: The pooled embedding by default, as released. Maps ``(B, C, H, W)`` are averaged over their
            pixels.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        kappa: Weight of the correlations with other dimensions, >= 0; 0.01 as released.
        expansion: Width within the projector over the student's; 2 as released.
        gather: Whether to correlate over the batch of all ranks, and not over each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> teacher = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 32)})
        >>> loss = RSDLoss()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 0.1,
        student_layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        kappa: float = 0.01,
        expansion: int = 2,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if not kappa >= 0 or expansion < 1:
            raise UserError(f"kappa must be >= 0 and expansion >= 1, got {kappa} and {expansion}.")
        self.kappa = kappa
        self.expansion = expansion
        self.gather = gather
        self.projectors = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a projector for each pair of layers."""
        widths = [(s.shape[1], t.shape[1]) for s, t in vector_pairs(self, student, teacher)]
        self.projectors = nn.ModuleList(_projector(s, self.expansion * s, t) for s, t in widths)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        # gathered before the projector, whose batch norm then sees the batch of all ranks too
        pairs = [
            all_gather_grad(*pair, active=self.gather and self.training)
            for pair in vector_pairs(self, student, teacher)
        ]
        parts = zip(require_built(self, self.projectors), pairs, strict=True)
        return torch.stack([rsd_projector_loss(s, t, projector=p, kappa=self.kappa) for p, (s, t) in parts]).sum()


def _projector(student_width: int, width: int, teacher_width: int) -> nn.Sequential:
    first, last = nn.Linear(student_width, width, bias=False), nn.Linear(width, teacher_width, bias=False)
    return nn.Sequential(first, SafeBatchNorm1d(width), nn.GELU(), last)
