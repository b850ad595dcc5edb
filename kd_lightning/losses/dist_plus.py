"""DIST+: DIST, and correlations of the last maps over channels and over samples."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._normalize import center
from kd_lightning.losses._pairs import map_pairs, match_dtype, same_size
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.dist import correlation_distance


@in_full_precision
def dist_plus_torchdistill_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    fmap_student: Tensor,
    fmap_teacher: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    iota: float = 1.0,
    kappa: float = 1.0,
    tau: float = 1.0,
    corrected: bool = False,
) -> Tensor:
    r"""Compute DIST of the logits and Pearson's correlations of two maps, over channels and over samples.

    .. math:: \mathrm{DIST} + \iota \, \bar\rho_\text{channels} + \kappa (1 - \bar\rho_\text{samples})

    with DIST that of :func:`~kd_lightning.losses.dist_loss` at temperature :math:`\tau`, with another epsilon; the
    first mean is over samples and pixels, of correlations over channels; the second over pixels, of correlations over
    the batch, of the sums of all channels. The authors released no code. torchdistill's, which this equals, adds the
    correlation over channels where one minus it must be meant: minimizing drives student and teacher apart.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        fmap_student: ``(B, n, H, W)``.
        fmap_teacher: The same shape.
        beta: Weight of the correlation of logits over the classes of each sample.
        gamma: Weight of the correlation of logits over the samples for each class.
        iota: Weight of the correlation of maps over channels.
        kappa: Weight of the correlation of maps over samples.
        tau: Temperature > 0.
        corrected: Whether one minus the correlation over channels is added.

    Returns:
        A scalar. What hardly varies counts as uncorrelated.

    Raises:
        ValueError: If the maps' shapes differ.

    Example:
        >>> logits, maps = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]), torch.eye(3)[:2].view(2, 3, 1, 1)
        >>> dist_plus_torchdistill_loss(logits, logits, 2 * maps, maps).round(decimals=3)
        tensor(2.)
        >>> dist_plus_torchdistill_loss(logits, logits, 2 * maps, maps, corrected=True).round(decimals=3)
        tensor(1.)
    """
    if fmap_student.shape != fmap_teacher.shape:
        raise UserError(
            f"DIST+ compares maps of one shape, got {tuple(fmap_student.shape)} of the student and "
            f"{tuple(fmap_teacher.shape)} of the teacher; map one to the other's shape first."
        )
    student, teacher = ((z / tau).softmax(1) for z in (logits_student, logits_teacher))
    logits = tau**2 * (beta * _distance(student, teacher) + gamma * _distance(student.T, teacher.T))
    maps = fmap_student.flatten(2), fmap_teacher.flatten(2)
    channels = correlation_distance(*(m.transpose(1, 2).flatten(0, 1) for m in maps))
    samples = _distance(*(m.sum(1).T for m in maps))
    return logits + iota * (channels if corrected else 1 - channels) + kappa * samples


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return one minus the mean correlation of paired rows, as ``correlation_distance`` with another epsilon."""
    (a, a_lengths, a_constant), (b, b_lengths, b_constant) = center(a), center(b)
    correlations = (a * b).sum(1, keepdim=True) / (a_lengths.clamp(min=1e-8) * b_lengths.clamp(min=1e-8))
    return 1 - torch.where(a_constant | b_constant, 0.0, correlations).mean()


class DistPlusLoss(DistillationLoss):
    """DIST+: :func:`dist_plus_torchdistill_loss`, with the correlations over samples in the batch of all ranks.

    T. Huang et al.: DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025; no release by the
    authors was found, and this follows https://github.com/yoshitomo-matsubara/torchdistill.

    Where resolutions differ, the larger map is average-pooled. Where widths differ, a 1x1 convolution, which trains
    with the student, maps its channels to the teacher's; that is ours.

    Args:
        weight: Factor of the term in the weighted sum; 2 as released, beside a weight of 1 on the labels.
        student_layers: The last map, as released.
        teacher_layers: The same of the teacher; the same name by default.
        beta: Weight of the correlation of logits over the classes of each sample; 2 as released.
        gamma: Weight of the correlation of logits over the samples for each class; 2 as released.
        iota: Weight of the correlation of maps over channels; 1 as released.
        kappa: Weight of the correlation of maps over samples; 1 as released.
        tau: Temperature > 0; 1, as released for ImageNet.
        corrected: Whether one minus the correlation over channels is added, and not the correlation itself, with
            which torchdistill's figures were made.
        gather: Whether to correlate over the batch of all ranks, and not over each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature is not above 0, a weight is negative, or not one layer is named.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"layer3": torch.rand(4, 8, 4, 4)})
        >>> teacher = Outputs(torch.rand(4, 10), {"layer3": torch.rand(4, 32, 8, 8)})
        >>> loss = DistPlusLoss()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 2.0,
        student_layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        beta: float = 2.0,
        gamma: float = 2.0,
        iota: float = 1.0,
        kappa: float = 1.0,
        tau: float = 1.0,
        corrected: bool = True,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if len(self.student_layers) != 1:
            raise UserError(
                f"DistPlusLoss compares one pair of maps, got the layers {list(self.student_layers)}; name one."
            )
        check_positive(tau=tau)
        if not min(beta, gamma, iota, kappa) >= 0:
            raise UserError(f"beta, gamma, iota and kappa must be >= 0, got {beta}, {gamma}, {iota} and {kappa}.")
        self.beta = beta
        self.gamma = gamma
        self.iota = iota
        self.kappa = kappa
        self.tau = tau
        self.corrected = corrected
        self.gather = gather
        self.regressor: nn.Module = nn.Identity()

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a 1x1 convolution where the maps' widths differ."""
        ((own, taught),) = map_pairs(self, student, teacher)
        if own.shape[1] != taught.shape[1]:
            self.regressor = nn.Conv2d(own.shape[1], taught.shape[1], kernel_size=1, bias=False)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        own, taught = same_size(*map_pairs(self, student, teacher)[0])
        if not isinstance(self.regressor, nn.Identity):
            own = self.regressor(match_dtype(self.regressor, own))
        gathered = all_gather_grad(
            student.logits, teacher.logits.detach(), own, taught, active=self.gather and self.training
        )
        return dist_plus_torchdistill_loss(
            *gathered,
            beta=self.beta,
            gamma=self.gamma,
            iota=self.iota,
            kappa=self.kappa,
            tau=self.tau,
            corrected=self.corrected,
        )
