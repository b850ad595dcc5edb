"""OFA: every stage of the student has a head that learns the teacher's logits, with more weight on the true class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._labels import class_indices
from kd_lightning.losses._pairs import match_dtype, pooled, require_built
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def ofa_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, eps: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""Compute the cross-entropy with the teacher, whose probability of the true class is enhanced.

    .. math:: -\frac{1}{B} \sum_{b,c} \big( (p^t_{bc} + y_{bc})^\epsilon - y_{bc} \big) \log p^s_{bc}, \qquad
              p = \mathrm{softmax}(z / T)

    with y the one-hot label. With :math:`\epsilon = 1` this is plain cross-entropy with the teacher; the enhancement
    begins above 1. There is no factor :math:`T^2`. The released code takes the logarithm of a softmax, which is
    infinite for saturated logits; here it is the log-softmax.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        target: Class indices ``(B,)``, -1 where unlabelled (y is 0 there), or class probabilities ``(B, C)``, of which
            the largest counts, as released.
        eps: The exponent, > 0.
        temperature: T > 0.

    Returns:
        A scalar, for eps >= 1 not below 0.

    Example:
        >>> ofa_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([3, -1]))
        tensor(1.3863)
    """
    probabilities = (logits_teacher / temperature).softmax(1)
    classes = torch.arange(logits_student.shape[1], device=logits_student.device)
    true_class = (class_indices(target)[:, None] == classes).to(probabilities)
    weights = (probabilities + true_class).pow(eps) - true_class
    return -(weights * F.log_softmax(logits_student / temperature, dim=1)).sum(1).mean()


class OFALoss(DistillationLoss):
    """OFA, one for all: :func:`ofa_loss` of the logits and of a head on each of the student's layers, summed.

    Z. Hao et al.: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation,
    NeurIPS 2023, https://arxiv.org/abs/2310.19444; authors' code: https://github.com/Hao840/OFAKD

    Of the teacher only the logits are read, so that they can be cached. The heads are ours: the layer's output is
    pooled and mapped to the classes by a linear layer; the released ones have convolutions or transformer blocks, as
    many as stages are left. They train with the student and are not part of it. Released with 300 epochs on CIFAR-100,
    batches of 128 on each GPU, a cosine schedule and, for CNNs, a weight decay of 2e-3.

    Args:
        weight: 1, as released.
        student_layers: The stages of a CIFAR ResNet by default; four stages as released. Maps ``(B, C, H, W)`` are
            averaged over their pixels, tokens ``(B, N, C)`` over the tokens.
        eps: The exponent, > 0; 1 as released for CIFAR-100, 1.5 on ImageNet (ResNet-18 from DeiT-T).
        temperature: T > 0; 1 as released.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If ``eps`` or the temperature is not above 0.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer2": torch.rand(2, 8, 4, 4)})
        >>> teacher = Outputs(torch.rand(2, 10))
        >>> loss = OFALoss(student_layers=["layer2"])
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        eps: float = 1.0,
        temperature: float = 1.0,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, student_layers=student_layers, warmup_epochs=warmup_epochs)
        self.teacher_layers = ()
        if not (eps > 0 and temperature > 0):
            raise UserError(f"eps and temperature must be above 0, got {eps} and {temperature}.")
        if not self.student_layers:
            raise UserError("OFALoss has a head on each of student_layers; name at least one.")
        self.eps = eps
        self.temperature = temperature
        self.heads = nn.ModuleList()

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` for layers that give one number for an image."""
        for name in self.student_layers:
            if student.features[name].dim() < 2:
                raise UserError(f"OFALoss needs more than one number (B,) of layer {name!r}; name another.")

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a head for each layer."""
        widths = [pooled(student.features[name]).shape[1] for name in self.student_layers]
        self.heads = nn.ModuleList(nn.Linear(width, student.logits.shape[1]) for width in widths)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        heads = zip(require_built(self, self.heads), self.student_layers, strict=True)
        logits = [head(match_dtype(head, pooled(student.features[name]))) for head, name in heads]
        said, options = teacher.logits.detach(), {"eps": self.eps, "temperature": self.temperature}
        return torch.stack([ofa_loss(each, said, labels, **options) for each in (student.logits, *logits)]).sum()
