"""Neuron selectivity transfer: what the channels respond to, whatever their order and number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._pairs import map_pairs, same_size
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def neuron_selectivity_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Compute the squared maximum mean discrepancy between both networks' channels.

    Each channel's map, normalised, is one sample; the kernel is the polynomial :math:`k(x, y) = (x^\top y)^2`.

    .. math:: \frac{1}{B} \sum_b \Big( \frac{1}{C^2} \sum_{ij} k(s_{bi}, s_{bj})
              + \frac{1}{C'^2} \sum_{ij} k(t_{bi}, t_{bj}) - \frac{2}{CC'} \sum_{ij} k(s_{bi}, t_{bj}) \Big)

    The order of the channels and a factor on any of them change nothing. The larger map is average-pooled to the
    smaller one's size.

    Args:
        student_features: ``(B, C, H, W)``.
        teacher_features: ``(B, C', H', W')``.

    Returns:
        A scalar >= 0 (up to rounding), and 0 where both sets of channels agree.

    Example:
        >>> maps = torch.rand(2, 8, 4, 4)
        >>> abs(neuron_selectivity_loss(maps, maps.flip(1)).item()) < 1e-5
        True
    """
    student_features, teacher_features = same_size(student_features, teacher_features)
    student, teacher = normalize(student_features.flatten(2), dim=2), normalize(teacher_features.flatten(2), dim=2)
    return _kernel(student, student) + _kernel(teacher, teacher) - 2 * _kernel(student, teacher)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(1, 2)).square().mean()


class NeuronSelectivityLoss(DistillationLoss):
    """Neuron selectivity transfer (NST): :func:`neuron_selectivity_loss`, summed over the layers.

    Z. Huang, N. Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017,
    https://arxiv.org/abs/1707.01219; code of the authors' group: https://github.com/TuSimple/neuron-selectivity-transfer

    Args:
        weight: 50, as in the CRD benchmark (https://github.com/HobbitLong/RepDistiller).
        student_layers: The stages of a CIFAR ResNet by default.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 8, 16, 16)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 32, 8, 8)})
        >>> NeuronSelectivityLoss(student_layers=["layer3"])(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 50.0,
        student_layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        teacher_layers: Sequence[str] | None = None,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` for layers that give no maps."""
        map_pairs(self, student, teacher, vectors=False)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        pairs = map_pairs(self, student, teacher, vectors=False)
        return torch.stack([neuron_selectivity_loss(s, t) for s, t in pairs]).sum()
