"""What the losses on features share: pairs of tensors, one resolution, a batch norm for a batch of one."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss, Term


def feature_pairs(loss: DistillationLoss, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """What a loss compares, pair by pair, the teacher's without gradient.

    Args:
        loss: Says which layers are read.
        student: The student's outputs.
        teacher: The teacher's.

    Raises:
        ValueError: If no layer is named, or a layer gives one number for an image.
    """
    if not loss.student_layers:
        raise UserError(f"{type(loss).__name__} compares features; name at least one layer in student_layers.")
    layers = zip(loss.student_layers, loss.teacher_layers, strict=True)
    pairs = [(student.features[s], teacher.features[t].detach()) for s, t in layers]
    for name, pair in zip(loss.student_layers, pairs, strict=True):
        if min(features.dim() for features in pair) < 2:
            raise UserError(f"{type(loss).__name__} needs more than one number (B,) of layer {name!r}; name another.")
    return pairs


def vector_pairs(loss: DistillationLoss, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """As :func:`feature_pairs`, with one vector ``(B, C)`` for an image.

    Maps ``(B, C, H, W)`` are averaged over their pixels, tokens ``(B, N, C)`` over their number.
    """
    return [(pooled(s), pooled(t)) for s, t in feature_pairs(loss, student, teacher)]


@in_full_precision
def pooled(features: Tensor) -> Tensor:
    """One vector ``(B, C)`` for an image: the mean over the pixels of a map, or over tokens ``(B, N, C)``."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.dim() == 3 else features.flatten(1)


def map_pairs(
    loss: DistillationLoss, student: Outputs, teacher: Outputs, vectors: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """As :func:`feature_pairs`, with a map ``(B, C, H, W)`` for an image.

    Args:
        loss: Says which layers are read.
        student: The student's outputs.
        teacher: The teacher's.
        vectors: Whether ``(B, C)`` is taken as a 1x1 map.

    Raises:
        ValueError: If a layer gives something else; the message names it.
    """
    takes = "maps (B, C, H, W) or vectors (B, C)" if vectors else "maps (B, C, H, W)"

    def as_map(owner: str, layer: str, features: Tensor) -> Tensor:
        if vectors and features.dim() == 2:
            return features[:, :, None, None]
        if features.dim() == 4:
            return features
        raise UserError(
            f"{type(loss).__name__} compares {takes}, but the {owner}'s layer {layer!r} gives "
            f"{tuple(features.shape)}; name a layer that fits."
        )

    layers = zip(loss.student_layers, loss.teacher_layers, feature_pairs(loss, student, teacher), strict=True)
    return [(as_map("student", a, s), as_map("teacher", b, t)) for a, b, (s, t) in layers]


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two ``(B, C, H, W)`` maps to the smaller one's height and width.

    Example:
        >>> import torch
        >>> student, teacher = same_size(torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4))
        >>> student.shape, teacher.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 5, 4, 4]))
    """
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return _pool(student, size), _pool(teacher, size)


@in_full_precision
def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)


def fit_to(part: nn.Module, features: Tensor) -> Tensor:
    """The features in the type of a learned part's weights (under autocast its layers choose for themselves)."""
    return features.to(next(part.parameters()).dtype)


def require_built(loss: Term, parts: nn.ModuleList) -> nn.ModuleList:
    """Return a loss's learned parts, one for each layer or pair of layers.

    Raises:
        RuntimeError: If ``build`` was not called yet.
    """
    if not len(parts):
        raise RuntimeError(
            f"The learned parts of {type(loss).__name__} are not built yet; call build with the "
            "outputs of a dry run before the first step."
        )
    return parts


class MapNorm(nn.Module):
    """Batch norm that uses its running statistics where a channel has one single value and so no variance.

    That is a last batch of one image with a 1x1 map, which ``nn.BatchNorm2d`` refuses in training.

    Args:
        channels: C of the ``(B, C, H, W)`` maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)`` maps."""
        norm = self.norm
        if features.numel() > features.shape[1]:
            return norm(features)
        return F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
