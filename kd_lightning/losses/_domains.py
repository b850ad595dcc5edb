"""What the losses of domain adaptation share: one vector for each image of either domain, with gradient."""

from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._pairs import pooled
from kd_lightning.losses.base import AlignmentLoss


def domain_vectors(loss: AlignmentLoss, source: Outputs, target: Outputs) -> list[tuple[Tensor, Tensor]]:
    """The vectors ``(B, C)`` of both domains, layer by layer; maps are averaged over their pixels.

    Args:
        loss: Says which layers are read.
        source: What the network said of the source's images.
        target: What it said of the target's, which may be more or fewer.

    Raises:
        ValueError: If no layer is named, or a layer gives one number for an image.
    """
    if not loss.layers:
        raise UserError(f"{type(loss).__name__} compares features; name at least one layer in layers.")
    for name in loss.layers:
        if source.features[name].dim() < 2:
            raise UserError(f"{type(loss).__name__} needs more than one number (B,) of layer {name!r}; name another.")
    return [(pooled(source.features[name]), pooled(target.features[name])) for name in loss.layers]


def as_rows(source_features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both flattened to ``(B, n)``.

    Raises:
        ValueError: If n differs.
    """
    source, target = source_features.flatten(1), target_features.flatten(1)
    if source.shape[1] != target.shape[1]:
        raise UserError(
            f"Domains are compared in one space, got {source.shape[1]} numbers for a sample of the source and "
            f"{target.shape[1]} for one of the target; read both from the same layer."
        )
    return source, target
