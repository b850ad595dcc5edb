"""SRD: the log of a high power of the distance between normalised vectors, beside the divergence of the logits."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._normalize import standardize_columns
from kd_lightning.losses._pairs import match_dtype, pooled, require_built, vector_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.soft_target import soft_target_loss


def srd_loss(
    fmap_student: Tensor, logits_student: Tensor, fmap_teacher: Tensor, logits_teacher: Tensor, *, embed: nn.Module
) -> Tensor:
    r"""Compute the log of the summed fourth powers of the distance, and the divergence of the logits.

    .. math:: 2 \log \sum_{b,d} \big( \mathrm{BN}(E \bar s_b) - \mathrm{BN}(\bar t_b) \big)_d^4
              + \frac{1}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(z^t_b) \,\|\, \mathrm{softmax}(z^s_b))

    with mean pixels, and BN the batch norm with the batch's own (biased) statistics, without scale and shift, eps
    1e-4, on both sides. It is a log of a *sum*, so that the gradient does not depend on the batch's size or the width.
    The sum is kept above the smallest number of its type, so that value and gradient are finite at equality.

    Args:
        fmap_student: ``(B, D, H, W)``; tokens ``(B, N, D)`` and vectors ``(B, D)`` as well.
        logits_student: ``(B, C)``.
        fmap_teacher: ``(B, D', H', W')``, likewise.
        logits_teacher: ``(B, C)``.
        embed: Module from ``(B, D)`` to ``(B, D')``; as released linear.

    Example:
        >>> logits, embed = torch.rand(4, 10), nn.Linear(3, 5)
        >>> srd_loss(torch.rand(4, 3, 2, 2), logits, torch.rand(4, 5, 2, 2), logits, embed=embed).shape
        torch.Size([])
    """
    embedded = embed(match_dtype(embed, pooled(fmap_student)))
    distance = _log_distance(embedded, pooled(fmap_teacher))
    return distance + soft_target_loss(logits_student, logits_teacher, temperature=1.0)


def srd_deit_loss(embed_student: Tensor, embed_teacher: Tensor, *, embed: nn.Module) -> Tensor:
    r"""Compute the form of the authors' DeiT code: a correlation of each dimension, and not a distance.

    .. math:: \log \Big( \sum_d (c_d - 1)^4 + 10^{-5} \Big), \qquad
              c_d = \frac{1}{B} \sum_b \mathrm{BN}(E s_b)_d \, \mathrm{BN}(t_b)_d

    with eps 0; a dimension that does not vary counts as uncorrelated. The released class calls a parent by a name
    that does not exist, so that this is what it states and not what was run.

    Args:
        embed_student: ``(B, D)``.
        embed_teacher: ``(B, D')``.
        embed: Module from ``(B, D)`` to ``(B, D')``.

    Example:
        >>> vectors = torch.tensor([[1.0, 3.0], [2.0, 5.0], [4.0, 1.0]])
        >>> srd_deit_loss(vectors, 2 * vectors + 1, embed=nn.Identity())
        tensor(-11.5129)
    """
    return _log_decorrelation(embed(match_dtype(embed, embed_student)), embed_teacher)


@in_full_precision
def srd_torchdistill_loss(
    embed_student: Tensor,
    embed_teacher: Tensor,
    logits_student: Tensor,
    logits_teacher: Tensor,
    *,
    exponent: float = 4.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Compute the form of torchdistill, for vectors that are normalised already.

    .. math:: 2 \log \sum_{b,d} |s_{bd} - t_{bd}|^p + \frac{1}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(z^t_b / T) \,\|\,
              \mathrm{softmax}(z^s_b / T))

    without a factor :math:`T^2`; code: https://github.com/yoshitomo-matsubara/torchdistill

    Args:
        embed_student: ``(B, D)``.
        embed_teacher: ``(B, D)``.
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        exponent: p, above 1.
        temperature: T > 0.

    Example:
        >>> logits = torch.rand(4, 10)
        >>> srd_torchdistill_loss(torch.zeros(4, 1), torch.full((4, 1), 0.5), logits, logits)
        tensor(-2.7726)
    """
    divergence = soft_target_loss(logits_student, logits_teacher, temperature=temperature) / temperature**2
    return 2 * _log((embed_student - embed_teacher).abs().pow(exponent).sum()) + divergence


@in_full_precision
def _log_distance(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (standardize_columns(rows, variance_eps=1e-4) for rows in (student, teacher))
    return 2 * _log((student - teacher).pow(4).sum())


@in_full_precision
def _log_decorrelation(student: Tensor, teacher: Tensor) -> Tensor:
    correlations = (standardize_columns(student) * standardize_columns(teacher)).mean(0)
    return ((correlations - 1).pow(4).sum() + 1e-5).log()


def _log(total: Tensor) -> Tensor:
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


class SRDLoss(DistillationLoss):
    """SRD, a simple recipe: :func:`srd_loss` with a learned linear layer, both terms in the batch of all ranks.

    R. Miles, K. Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024,
    https://arxiv.org/abs/2303.11098; authors' code: https://github.com/roymiles/Simple-Recipe-Distillation

    Released with 100 epochs on ImageNet, and in DeiT's schedule. The bias of the released layer, which has no effect
    before a batch norm, is left out.

    Args:
        weight: 1, as released, beside a weight of 1 on the labels.
        student_layers: The last map by default, as released; it is averaged over its pixels, tokens over the tokens.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        correlation: Compute :func:`srd_deit_loss` in place of the distance; the divergence stays.
        gather: Whether to normalise over the batch of all ranks, and not over each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"layer3": torch.rand(4, 8, 4, 4)})
        >>> teacher = Outputs(torch.rand(4, 10), {"layer3": torch.rand(4, 32, 8, 8)})
        >>> loss = SRDLoss()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        correlation: bool = False,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        self.correlation = correlation
        self.gather = gather
        self.embeds = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a linear layer for each pair of layers."""
        widths = [(s.shape[1], t.shape[1]) for s, t in vector_pairs(self, student, teacher)]
        self.embeds = nn.ModuleList(nn.Linear(s, t, bias=False) for s, t in widths)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        vectors = chain.from_iterable(vector_pairs(self, student, teacher))
        student_logits, teacher_logits, *rest = all_gather_grad(
            student.logits, teacher.logits.detach(), *vectors, active=self.gather and self.training
        )
        compare = _log_decorrelation if self.correlation else _log_distance
        parts = zip(require_built(self, self.embeds), rest[::2], rest[1::2], strict=True)
        terms = [compare(embed(match_dtype(embed, s)), t) for embed, s, t in parts]
        return torch.stack([*terms, soft_target_loss(student_logits, teacher_logits, temperature=1.0)]).sum()
