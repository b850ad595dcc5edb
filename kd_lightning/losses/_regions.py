"""Regions of an image: means of the last map over grids, and the logits that a network's classifier gives for them."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._classifier import ClassifierReference
from kd_lightning.losses._pairs import map_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss

_FINEST = 4
"""Side of the grid to which a map is pooled first, as released."""


@in_full_precision
def sdd_pool(fmap: Tensor, *, pools: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Average a map over regions: to a grid of 4x4, and that to each of the grids.

    Args:
        fmap: ``(B, n, H, W)``.
        pools: Sides of the grids.

    Returns:
        ``(B, n, regions)``, grid by grid; with a first grid of 1, region 0 is the whole image.

    Example:
        >>> sdd_pool(torch.arange(16.0).view(1, 1, 4, 4), pools=(1, 2))
        tensor([[[ 7.5000,  2.5000,  4.5000, 10.5000, 12.5000]]])
    """
    finest = F.adaptive_avg_pool2d(fmap, _FINEST)
    return torch.cat([F.adaptive_avg_pool2d(finest, side).flatten(2) for side in pools], dim=2)


# under the names of the published reference values, which call every function a loss
sdd_pool_1_2_loss, sdd_pool_1_2_4_loss = partial(sdd_pool, pools=(1, 2)), sdd_pool


class RegionLoss(DistillationLoss):
    """Compares the logits of regions, which the networks' own classifiers give for their last maps."""

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None,
        pools: Sequence[int],
        warmup_epochs: int,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if len(self.student_layers) != 1:
            raise UserError(
                f"{type(self).__name__} reads one layer, the last map before the classifier, got "
                f"{list(self.student_layers)}; name one in student_layers."
            )
        if list(pools)[:1] != [1] or not all(0 < side <= _FINEST for side in pools):
            raise UserError(f"pools must start with 1, the whole image, and be at most {_FINEST}, got {list(pools)}.")
        self.pools = tuple(pools)
        self.classifiers: tuple[ClassifierReference, ...] = ()

    def build(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        student_network: nn.Module | None = None,
        teacher_network: nn.Module | None = None,
    ) -> None:
        """Find the classifiers of both networks, unless there is no teacher to train with."""
        if student_network is None or teacher_network is None:
            return
        name = type(self).__name__
        layers = (self.student_layers[0], self.teacher_layers[0])
        self.classifiers = (
            ClassifierReference(student_network, "student", name, layers[0]),
            ClassifierReference(teacher_network, "teacher", name, layers[1]),
        )
        for reference, layer, fmap in zip(self.classifiers, layers, map_pairs(self, student, teacher)[0], strict=True):
            if fmap.shape[1] != reference().in_features:
                raise UserError(
                    f"{name} applies the classifier to regions of the last map, but it takes "
                    f"{reference().in_features} values and layer {layer!r} has {fmap.shape[1]} channels; name the "
                    "layer whose pooled map it takes."
                )

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        if not self.classifiers:
            raise RuntimeError(f"{type(self).__name__} has no classifiers yet; call build with both networks first.")
        fmaps = map_pairs(self, student, teacher)[0]
        of_student, of_teacher = (self._logits(*pair) for pair in zip(self.classifiers, fmaps, strict=True))
        return self.compare(of_student, of_teacher.detach(), labels)

    def _logits(self, reference: ClassifierReference, fmap: Tensor) -> Tensor:
        classifier = reference()
        regions = sdd_pool(fmap, pools=self.pools).transpose(1, 2)
        logits: Tensor = classifier(regions.to(classifier.weight.dtype))
        return logits.transpose(1, 2)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Compute the term from the logits of the regions, ``(B, C, N)``."""
