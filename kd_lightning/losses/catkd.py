"""CAT-KD: where each class is seen, compared class by class in both networks' class activation maps."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._classifier import ClassifierReference
from kd_lightning.losses._normalize import normalize as to_length_1
from kd_lightning.losses._pairs import map_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def catkd_loss(fmap_student: Tensor, fmap_teacher: Tensor, *, resolution: int = 2, normalize: bool = False) -> Tensor:
    r"""Compute the mean squared difference of class activation maps, average-pooled to one resolution.

    .. math:: \frac{1}{B C r^2} \sum_{b,c} \| P_r(a^s_{bc}) - P_r(a^t_{bc}) \|^2

    with ``normalize`` each pooled map divided by its length first (0 where that is 0), so that a positive factor on
    any map changes nothing.

    Args:
        fmap_student: Class activation maps, ``(B, C, H, W)`` with one map for each class.
        fmap_teacher: ``(B, C, H', W')``.
        resolution: r, height and width after pooling.
        normalize: Divide each map by its length.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Raises:
        UserError: If the numbers of classes differ.

    Example:
        >>> import torch
        >>> maps = torch.rand(2, 5, 4, 4)
        >>> catkd_loss(maps + 1, maps, resolution=2)
        tensor(1.)
    """
    if fmap_student.shape[:2] != fmap_teacher.shape[:2]:
        raise UserError(
            f"catkd_loss compares one map for each class, got {tuple(fmap_student.shape)} of the student and "
            f"{tuple(fmap_teacher.shape)} of the teacher; use networks of the same classes."
        )
    student, teacher = (F.adaptive_avg_pool2d(fmap, resolution).flatten(2) for fmap in (fmap_student, fmap_teacher))
    if normalize:
        student, teacher = to_length_1(student, dim=2), to_length_1(teacher, dim=2)
    return F.mse_loss(student, teacher)


def catkd_normalized_loss(
    fmap_student: Tensor, fmap_teacher: Tensor, *, resolution: int = 2, normalize: bool = True
) -> Tensor:
    """Compute :func:`catkd_loss` with normalized maps, as released for some pairs of networks.

    Args:
        fmap_student: ``(B, C, H, W)``.
        fmap_teacher: ``(B, C, H', W')``.
        resolution: Height and width after pooling.
        normalize: Divide each map by its length.

    Example:
        >>> import torch
        >>> maps = torch.rand(2, 5, 4, 4)
        >>> catkd_normalized_loss(3 * maps, maps).item() < 1e-9
        True
    """
    return catkd_loss(fmap_student, fmap_teacher, resolution=resolution, normalize=normalize)


@in_full_precision
def catkd_binarized_loss(
    fmap_student: Tensor, fmap_teacher: Tensor, *, resolution: int = 2, normalize: bool = True, weight: float = 1.0
) -> Tensor:
    """Compute ``weight`` times :func:`catkd_loss` with the teacher's maps reduced to 0 and 1.

    A pixel is 1 where it exceeds the mean of its map's absolute values. The paper shows with it that the places of a
    class matter, and not the strength.

    Args:
        fmap_student: ``(B, C, H, W)``.
        fmap_teacher: ``(B, C, H', W')``.
        resolution: Height and width after pooling.
        normalize: Divide each map by its length.
        weight: Factor of the loss.

    Example:
        >>> import torch
        >>> maps = torch.rand(2, 5, 4, 4)
        >>> catkd_binarized_loss(maps, maps).equal(catkd_binarized_loss(maps, 3 * maps))
        True
    """
    seen = (fmap_teacher > fmap_teacher.abs().mean((2, 3), keepdim=True)).to(fmap_teacher.dtype)
    return weight * catkd_loss(fmap_student, seen, resolution=resolution, normalize=normalize)


class CATKDLoss(DistillationLoss):
    """CAT-KD, class attention transfer: :func:`catkd_loss` of both networks' class activation maps.

    Z. Guo et al.: Class Attention Transfer Based Knowledge Distillation, CVPR 2023, https://arxiv.org/abs/2304.12777;
    authors' code: https://github.com/GzyAftermath/CAT-KD

    Released with the schedule of the CRD benchmark (240 epochs) on CIFAR-100, and 100 epochs at a rate of 0.2 on
    ImageNet. A class activation map is the last map, weighted by the weights of the network's own classifier; its
    bias, which the released networks do not have, is left out. The classifier is that of the network itself: it learns
    from this term too, and nothing is stored twice.

    Args:
        weight: 15, as released for ResNet-32x4 to ResNet-8x4 on CIFAR-100 (plain, 2x2). It differs by pair, as does
            ``normalize``: 0.7 for ResNet-56 to 20, 1.8 for 110 to 32; normalized 600 for ResNet-32x4 to ShuffleNet
            (4x4); on ImageNet 0.5 (plain, 4x4) and 10 (normalized, 2x2).
        student_layers: The last map by default, which the classifier reads after pooling.
        teacher_layers: Name of the teacher's layer; the same by default.
        resolution: Height and width after pooling, >= 1.
        normalize: Divide each pooled map by its length.
        binarize: Reduce the teacher's maps to 0 and 1, see :func:`catkd_binarized_loss`.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If more than one layer is named, or the resolution is below 1.

    Example:
        >>> import torch
        >>> from kd_lightning.features import FeatureTap
        >>> from kd_lightning.networks import resnet20, resnet56
        >>> student, teacher, images = resnet20(), resnet56(), torch.rand(2, 3, 32, 32)
        >>> outputs = [FeatureTap(network, ["layer3"])(images) for network in (student, teacher)]
        >>> loss = CATKDLoss()
        >>> loss.build(*outputs, student_network=student, teacher_network=teacher)
        >>> loss(*outputs, torch.tensor([3, 1])).shape, len(loss.state_dict())
        (torch.Size([]), 0)
    """

    compares_logits = True

    def __init__(
        self,
        *,
        weight: float = 15.0,
        student_layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        resolution: int = 2,
        normalize: bool = False,
        binarize: bool = False,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if len(self.student_layers) != 1:
            raise UserError(f"CATKDLoss reads one layer, the last map, got {list(self.student_layers)}; name one.")
        if resolution < 1:
            raise UserError(f"resolution must be >= 1, got {resolution}.")
        self.resolution = resolution
        self.normalize = normalize
        self.binarize = binarize
        self._classifiers: tuple[ClassifierReference, ...] = ()

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` for layers that give no maps."""
        map_pairs(self, student, teacher, vectors=False)

    def build(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        student_network: nn.Module | None = None,
        teacher_network: nn.Module | None = None,
    ) -> None:
        """Find both classifiers and keep references to them."""
        if student_network is None or teacher_network is None:
            return  # a checkpoint is loaded without a teacher
        name = type(self).__name__
        layers = (self.student_layers[0], self.teacher_layers[0])
        self._classifiers = (
            ClassifierReference(student_network, "student", name, layers[0]),
            ClassifierReference(teacher_network, "teacher", name, layers[1]),
        )
        (pair,) = map_pairs(self, student, teacher, vectors=False)
        for classifier, layer, fmap in zip(self._classifiers, layers, pair, strict=True):
            if classifier().in_features != fmap.shape[1]:
                raise UserError(
                    f"CATKDLoss reads the map that the classifier reads after pooling, but layer {layer!r} has "
                    f"{fmap.shape[1]} channels and the classifier {classifier.name!r} takes "
                    f"{classifier().in_features}; name the last map."
                )

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        if not self._classifiers:
            raise RuntimeError("CATKDLoss reads both networks' classifiers; call build with the networks first.")
        (pair,) = map_pairs(self, student, teacher, vectors=False)
        s, t = (_activation_maps(find(), fmap) for find, fmap in zip(self._classifiers, pair, strict=True))
        compare = catkd_binarized_loss if self.binarize else catkd_loss
        return compare(s, t.detach(), resolution=self.resolution, normalize=self.normalize)


def _activation_maps(classifier: nn.Linear, fmap: Tensor) -> Tensor:
    return F.conv2d(fmap, classifier.weight[:, :, None, None].to(fmap.dtype))
