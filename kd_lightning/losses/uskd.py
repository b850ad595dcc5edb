"""USKD: a student that teaches itself, with its own confidence and its ranking of the other classes as targets."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._labels import class_indices, mean_of_labelled
from kd_lightning.losses._pairs import match_dtype, pooled
from kd_lightning.losses._precision import in_full_precision, widen
from kd_lightning.losses.base import DistillationLoss

_NEVER = -1e9
"""Logit of a class that is left out; finite, for rows of which no class is left."""


@in_full_precision
def uskd_loss(
    logits_student: Tensor,
    feature_student: Tensor,
    target: Tensor,
    *,
    fc: nn.Module,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    corrected: bool = False,
) -> Tensor:
    r"""Compute three cross-entropies of a student with targets that it sets itself; no teacher is read.

    .. math:: \frac{1}{B} \sum_b -\alpha P_b \log p_{by} - \beta \sum_{c \ne y} Z_{bc} \log \hat p_{bc}
              - \mu \sum_c \tilde y_{bc} \log w_{bc}

    with p the student's softmax, :math:`\hat p` that over the classes other than the label, w the softmax of a second
    classifier on a middle feature, and targets without gradient:
    :math:`P_b = p_{by}^2 + 1 - \overline{p_y^2}`, with the mean over the batch;
    :math:`\tilde y`, the label smoothed by 0.1; and Zipf's law Z, 1 / place, normalized without the label, of the
    places of all classes by the score :math:`w_c / (1 - w_y + \epsilon) + \log p_c / (1 - \log p_y + \epsilon)`. The
    logarithms in the score are those of the authors' code, where the paper's formula has p itself.

    Args:
        logits_student: ``(B, C)``, C >= 2.
        feature_student: A middle feature, ``(B, n)``.
        target: Class indices ``(B,)``, where -1 leaves a row out; or class probabilities ``(B, C)``, for which see
            :func:`uskd_mixed_labels_loss`.
        fc: The second classifier, n values to C logits.
        alpha: Weight of the label's class.
        beta: Weight of the other classes.
        mu: Weight of the second classifier's cross-entropy.
        corrected: Whether p takes the place of log p in the score.

    Returns:
        A scalar, and 0 where no row has a label.

    Example:
        >>> uskd_loss(torch.zeros(1, 3), torch.zeros(1, 2), torch.tensor([0]), fc=nn.Linear(2, 3, bias=False)).detach()
        tensor(1.1734)
    """
    weak = widen(fc(match_dtype(fc, feature_student)))
    return _self_distillation(logits_student, weak, target, alpha, beta, mu, corrected)


@in_full_precision
def uskd_mixed_labels_loss(
    logits_student: Tensor,
    feature_student: Tensor,
    target: Tensor,
    *,
    fc: nn.Module,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    corrected: bool = False,
) -> Tensor:
    """Compute :func:`uskd_loss` for class probabilities, as mixup and CutMix make them.

    Of each row the two most probable classes count as labels: each has a target P of its own, both leave Z, and the
    score's denominators sum over both. In a row with a single class the authors' code takes an arbitrary second one,
    here the first of the others: its target P is 0, but it leaves Z.

    Args:
        logits_student: ``(B, C)``, C >= 3.
        feature_student: A middle feature, ``(B, n)``.
        target: Class probabilities ``(B, C)``, with rows of -1 where unlabelled.
        fc: The second classifier, n values to C logits.
        alpha: Weight of the labels' classes.
        beta: Weight of the other classes.
        mu: Weight of the second classifier's cross-entropy.
        corrected: Whether p takes the place of log p in the score, and a row with a single class has one label.

    Returns:
        A scalar, and 0 where no row has a label.

    Example:
        >>> mixed = torch.tensor([[0.7, 0.3, 0.0]])
        >>> uskd_mixed_labels_loss(torch.zeros(1, 3), torch.ones(1, 2), mixed, fc=nn.Linear(2, 3)).shape
        torch.Size([])
    """
    return uskd_loss(logits_student, feature_student, target, fc=fc, alpha=alpha, beta=beta, mu=mu, corrected=corrected)


@in_full_precision
def _self_distillation(
    student: Tensor, weak: Tensor, labels: Tensor, alpha: float, beta: float, mu: float, corrected: bool
) -> Tensor:
    """Return :func:`uskd_loss` from the logits of both classifiers."""
    targets, masses, classes = _label_classes(labels, student)
    labels = class_indices(labels)
    present, labelled = masses > 0, (labels >= 0)[:, None]
    counted = present if corrected else torch.ones_like(present)
    log_p, log_w = student.log_softmax(1), weak.log_softmax(1)
    chosen = log_p.gather(1, classes)
    squares = chosen.detach().exp().square()
    in_mean = labelled & counted
    mean = torch.where(in_mean, squares, 0.0).sum(0) / in_mean.sum(0).clamp(min=1)
    of_labels = -(torch.where(present, squares + masses - mean, 0.0) * chosen).sum(1)
    of_weak = -((0.9 * targets + 0.1 / student.shape[1]) * log_w).sum(1)
    removed = torch.zeros_like(student).scatter(1, classes, counted.to(student.dtype)) > 0
    ranked = log_p.detach().exp() if corrected else log_p.detach()
    zipf = _zipf(ranked, log_w.detach().exp(), classes, counted).masked_fill(removed, 0.0)
    zipf = zipf / zipf.sum(1, keepdim=True).clamp(min=torch.finfo(zipf.dtype).tiny)
    of_others = -(zipf * student.masked_fill(removed, _NEVER).log_softmax(1).masked_fill(removed, 0.0)).sum(1)
    return mean_of_labelled(alpha * of_labels + beta * of_others + mu * of_weak, labels)


def _label_classes(labels: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets ``(B, C)``, and the labels' masses and classes: one ``(B, 1)``, or two of probabilities."""
    if labels.is_floating_point():
        targets = labels.to(like.dtype).clamp(min=0)
        masses, classes = targets.sort(dim=1, descending=True, stable=True)
        return targets, masses[:, :2], classes[:, :2]
    classes = labels.clamp(min=0).long()[:, None]
    masses = torch.ones_like(like[:, :1])
    return torch.zeros_like(like).scatter(1, classes, masses), masses, classes


def _zipf(p: Tensor, w: Tensor, classes: Tensor, counted: Tensor) -> Tensor:
    """Return 1 / place of each class, ``(B, C)``, by the sum of two scores of each."""
    of_labels = [torch.where(counted, z.gather(1, classes), 0.0).sum(1, keepdim=True) for z in (w, p)]
    score = w / (1 - of_labels[0] + 1e-6) + p / (1 - of_labels[1] + 1e-6)
    places = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return 1 / (places + 1).to(score.dtype)


class USKDLoss(DistillationLoss):
    """Universal self-knowledge distillation (USKD): :func:`uskd_loss`, with the mean over the batch of all ranks.

    Z. Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels, ICCV 2023, https://arxiv.org/abs/2303.13005; authors' code:
    https://github.com/yzd-v/cls_KD

    It needs no teacher. The second classifier trains with the student and is not part of its network.

    Args:
        weight: Factor of the term in the weighted sum; 1 as released, beside a weight of 1 on the labels.
        student_layers: The layer whose output the second classifier takes, averaged over pixels; a stage before the
            last.
        alpha: Weight of the label's class; 0.1, the authors' for CIFAR-100 (1 on ImageNet).
        beta: Weight of the other classes; 0.1 as released.
        mu: Weight of the second classifier's cross-entropy; 0.1, the authors' for CIFAR-100 (0.005 on ImageNet).
        corrected: Whether the slips named in :func:`uskd_loss` and :func:`uskd_mixed_labels_loss` are corrected.
        gather: Whether to take the mean over the batch of all ranks, and not over each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If a weight is negative, or not one layer is named.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"layer2": torch.rand(4, 8, 4, 4)})
        >>> loss = USKDLoss()
        >>> loss.build(student, student)
        >>> loss(student, None, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    needs_teacher = False
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("layer2",),
        alpha: float = 0.1,
        beta: float = 0.1,
        mu: float = 0.1,
        corrected: bool = False,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, student_layers=student_layers, warmup_epochs=warmup_epochs)
        if len(self.student_layers) != 1:
            raise UserError(
                f"USKDLoss reads one layer of the student, got {list(self.student_layers)}; name one in student_layers."
            )
        if not min(alpha, beta, mu) >= 0:
            raise UserError(f"alpha, beta and mu must be >= 0, got {alpha}, {beta} and {mu}.")
        self.teacher_layers = ()
        self.alpha = alpha
        self.beta = beta
        self.mu = mu
        self.corrected = corrected
        self.gather = gather
        self.fc: nn.Module | None = None

    def check(self, student: Outputs, teacher: Outputs | None) -> None:
        """Raise a ``UserError`` if the layer returns one number per image."""
        if student.features[self.student_layers[0]].dim() < 2:
            raise UserError(
                f"USKDLoss needs more than one number (B,) of layer {self.student_layers[0]!r}; name another."
            )

    def build(self, student: Outputs, teacher: Outputs | None, **networks: nn.Module | None) -> None:
        """Create the second classifier."""
        feature = pooled(student.features[self.student_layers[0]])
        self.fc = nn.Linear(feature.shape[1], student.logits.shape[1])

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        if self.fc is None:
            raise RuntimeError("USKDLoss has no second classifier yet; call build with the outputs of a dry run first.")
        feature = pooled(student.features[self.student_layers[0]])
        weak = self.fc(match_dtype(self.fc, feature))
        logits, weak, labels = all_gather_grad(student.logits, weak, labels, active=self.gather and self.training)
        return _self_distillation(logits, weak, labels, self.alpha, self.beta, self.mu, self.corrected)
