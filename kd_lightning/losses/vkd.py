"""VkD: the student's vector, through an orthogonal projection, equals the teacher's normalised vector."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs, maps_to_tokens
from kd_lightning.losses._pairs import map_pairs, require_built
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def vkd_loss(tokens_student: Tensor, fmap_teacher: Tensor, projector_weight: Tensor, *, alpha: float = 1.0) -> Tensor:
    r"""Compute the Huber loss between the projected mean token and the teacher's normalised mean pixel.

    .. math:: \frac{\alpha}{B D'} \sum_{b,d} h\big( (W \bar s_b - \mathrm{LN}(\bar t_b))_d \big), \qquad
              h(x) = \tfrac12 x^2 \text{ where } |x| < 1, \text{ else } |x| - \tfrac12

    with LN the layer norm without scale and shift, eps 1e-5. The student is not normalised.

    Args:
        tokens_student: ``(B, N, D)``.
        fmap_teacher: ``(B, D', H, W)``.
        projector_weight: W, ``(D', D)``; orthonormal in VkD, see :func:`vkd_orthogonal_loss`.
        alpha: Factor of the loss.

    Returns:
        A scalar >= 0.

    Example:
        >>> vkd_loss(torch.zeros(2, 4, 3), torch.rand(2, 5, 2, 2), torch.eye(5, 3)) > 0
        tensor(True)
    """
    student = tokens_student.mean(1) @ projector_weight.to(tokens_student).T
    teacher = fmap_teacher.mean((2, 3))
    return alpha * F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:]))


def vkd_orthogonal_loss(
    tokens_student: Tensor, fmap_teacher: Tensor, base: Tensor, *, original: Tensor, alpha: float = 1.0
) -> Tensor:
    """Compute :func:`vkd_loss` with the projection :func:`orthogonal_weight`.

    Args:
        tokens_student: ``(B, N, D)``.
        fmap_teacher: ``(B, D', H, W)``.
        base: Constant orthogonal matrix, ``(m, m)`` with m the larger of D' and D.
        original: The learned parameters, ``(D', D)``.
        alpha: Factor of the loss.

    Example:
        >>> tokens, maps = torch.rand(2, 4, 3), torch.rand(2, 5, 2, 2)
        >>> vkd_orthogonal_loss(tokens, maps, torch.eye(5), original=torch.rand(5, 3)).shape
        torch.Size([])
    """
    return vkd_loss(tokens_student, fmap_teacher, orthogonal_weight(original, base), alpha=alpha)


def vkd_orthogonal_square_loss(
    tokens_student: Tensor, fmap_teacher: Tensor, base: Tensor, *, original: Tensor, alpha: float = 1.0
) -> Tensor:
    r"""Compute :func:`vkd_loss` with :math:`W = B e^{A - A^\top}`, A the strict lower triangle of ``original``.

    It is the map that ``torch.nn.utils.parametrizations.orthogonal`` chooses for square weights. On a GPU
    ``torch.matrix_exp`` waits for the device, so that :class:`VkDLoss` has reflections for square weights too.

    Args:
        tokens_student: ``(B, N, D)``.
        fmap_teacher: ``(B, D, H, W)``.
        base: B, a constant orthogonal matrix ``(D, D)``.
        original: The learned parameters, ``(D, D)``.
        alpha: Factor of the loss.

    Example:
        >>> tokens, maps = torch.rand(2, 4, 3), torch.rand(2, 3, 2, 2)
        >>> vkd_orthogonal_square_loss(tokens, maps, torch.eye(3), original=torch.rand(3, 3)).shape
        torch.Size([])
    """
    lower = original.tril(-1)
    return vkd_loss(tokens_student, fmap_teacher, base @ torch.matrix_exp(lower - lower.T), alpha=alpha)


@in_full_precision
def orthogonal_weight(original: Tensor, base: Tensor) -> Tensor:
    r"""Return a matrix with orthonormal columns (rows, where it is wide) as a product of Householder reflections.

    .. math:: W = B \, (H_1 H_2 \cdots H_n)_{1 \ldots n} \, \mathrm{sign}(\mathrm{diag}(A)), \qquad
              H_k = I - 2 \frac{a_k a_k^\top}{a_k^\top a_k}, \quad a_k = (0, \ldots, 1, A_{k+1,k}, A_{k+2,k}, \ldots)

    It is the map of ``torch.nn.utils.parametrizations.orthogonal``, which truncates the diagonal in place of taking
    its sign: there weight decay turns a diagonal of 1 into 0.999, and the whole weight into 0.

    Args:
        original: A, ``(m, n)``; where n > m, it is transposed first and W afterwards.
        base: B, orthogonal, of the larger of m and n.

    Example:
        >>> weight = orthogonal_weight(torch.rand(5, 3), torch.eye(5))
        >>> torch.allclose(weight.T @ weight, torch.eye(3), atol=1e-5)
        True
    """
    if original.shape[0] < original.shape[1]:
        return orthogonal_weight(original.T, base).T
    count = original.shape[1]
    vectors = original.tril(-1) + torch.eye(*original.shape, dtype=original.dtype, device=original.device)
    gram = vectors.T @ vectors
    # the product of reflections is I - V S^-1 V' (compact WY form), without a loop over them
    triangle = gram.triu(1) + torch.diag_embed(gram.diagonal() / 2)
    columns = torch.linalg.solve_triangular(triangle, vectors[:count].T, upper=True)
    identity = torch.eye(*original.shape, dtype=original.dtype, device=original.device)
    signs = torch.where(original.diagonal() < 0, -1.0, 1.0).to(original.dtype)
    weight: Tensor = base.to(original.dtype) @ (identity - vectors @ columns) * signs
    return weight


class VkDLoss(DistillationLoss):
    """VkD, orthogonal projection: :func:`vkd_orthogonal_loss`, summed over the layers.

    R. Miles, I. Elezi, J. Deng: VkD: Improving Knowledge Distillation using Orthogonal Projections, CVPR 2024,
    https://arxiv.org/abs/2403.06213; authors' code: https://github.com/roymiles/VkD

    Either network may give tokens, of which those without a place are left out, as released, maps or vectors. As
    released a ViT's distillation token learns from the teacher's logits beside it (see :class:`HeadLoss`); the
    released loop needs both weights above 0, here each term stands alone. Released with DeiT's schedule on ImageNet,
    300 epochs of AdamW at 5e-4.

    Args:
        weight: 1, as released, beside a weight of 1 on the divergence of the logits at temperature 1.
        student_layers: The last map by default; ``norm`` of a ViT.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 17, 8)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 32, 8, 8)})
        >>> loss = VkDLoss()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        self.projections = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a projection for each pair of layers."""
        widths = [(s.shape[1], t.shape[1]) for s, t in map_pairs(self, student, teacher)]
        for name, (_, width) in zip(self.teacher_layers, widths, strict=True):
            if width == 1:
                raise UserError(f"VkDLoss normalises the teacher's layer {name!r}, which has 1 channel; name another.")
        self.projections = nn.ModuleList(_Projection(*pair) for pair in widths)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        pairs = zip(require_built(self, self.projections), map_pairs(self, student, teacher), strict=True)
        return torch.stack([vkd_loss(maps_to_tokens(s), t, projection()) for projection, (s, t) in pairs]).sum()


class _Projection(nn.Module):
    """The learned parameters of an orthogonal projection, and the constant from which it starts."""

    base: Tensor

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        size = max(student_width, teacher_width)
        # drawn from a generator of its own: under DDP each rank has this constant and nobody sends it
        start = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        self.register_buffer("base", torch.linalg.qr(start).Q)
        self.original = nn.Parameter(-torch.eye(teacher_width, student_width))

    def forward(self) -> Tensor:
        return orthogonal_weight(self.original, self.base)
