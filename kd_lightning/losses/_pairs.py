"""The features that a loss compares: pairs of tensors, pooled to vectors or to one resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs, grid_of, tokens_to_maps
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import AlignmentLoss, DistillationLoss, Term


def feature_pairs(loss: DistillationLoss, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return the features that a loss compares, pair by pair, the teacher's without gradient.

    Args:
        loss: The loss, which names the layers.
        student: The student's outputs.
        teacher: The teacher's outputs.

    Raises:
        ValueError: If no layer is named, or a layer returns one number per image.
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
    """Return :func:`feature_pairs` as one vector ``(B, C)`` per image.

    Maps ``(B, C, H, W)`` are averaged over their pixels, tokens ``(B, N, C)`` over the tokens.
    """
    return [(pooled(s), pooled(t)) for s, t in feature_pairs(loss, student, teacher)]


@in_full_precision
def pooled(features: Tensor) -> Tensor:
    """Return one vector ``(B, C)`` per image: the mean over the pixels of a map, or over tokens ``(B, N, C)``."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.dim() == 3 else features.flatten(1)


def map_pairs(
    loss: DistillationLoss, student: Outputs, teacher: Outputs, vectors: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Return :func:`feature_pairs` as maps ``(B, C, H, W)``.

    Tokens ``(B, N, C)`` are laid out on their grid, without prefix tokens; see
    :func:`grid_of`. (Maps ``(B, H, W, C)`` are turned where a network's layers are read.)

    Args:
        loss: The loss, which names the layers.
        student: The student's outputs.
        teacher: The teacher's outputs.
        vectors: Whether ``(B, C)`` is accepted as a 1x1 map.

    Raises:
        ValueError: If a layer returns something else; the message names it.
    """
    layers = zip(loss.student_layers, loss.teacher_layers, feature_pairs(loss, student, teacher), strict=True)
    return [
        (_as_map(loss, "student", a, s, student, vectors), _as_map(loss, "teacher", b, t, teacher, vectors))
        for a, b, (s, t) in layers
    ]


def _as_map(
    loss: DistillationLoss, owner: str, layer: str, features: Tensor, outputs: Outputs, vectors: bool
) -> Tensor:
    if features.dim() == 4:
        return features
    if features.dim() == 2 and vectors:
        return features[:, :, None, None]
    tokens = features.shape[1] if features.dim() == 3 else 0
    grid = grid_of(outputs.features, layer) if tokens else None
    if grid is not None:
        return tokens_to_maps(features, grid)
    maps = "maps (B, C, H, W) or (B, H, W, C)"
    takes = f"{maps}, tokens (B, N, C) or vectors (B, C)" if vectors else f"{maps}, or tokens (B, N, C)"
    count = f", and {tokens} tokens are no grid, with or without prefix tokens" if tokens else ""
    declared = ", or set num_prefix_tokens of the network" if tokens else ""
    raise UserError(
        f"{type(loss).__name__} compares {takes}, but the {owner}'s layer {layer!r} returns "
        f"{tuple(features.shape)}{count}; name a layer that does{declared}."
    )


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two ``(B, C, H, W)`` maps to the smaller one's height and width.

    Example:
        >>> student, teacher = same_size(torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4))
        >>> student.shape, teacher.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 5, 4, 4]))
    """
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return _pool(student, size), _pool(teacher, size)


@in_full_precision
def resized(maps: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Return maps ``(B, C, H, W)`` of another height and width: average-pooled to a smaller one, else interpolated.

    Example:
        >>> resized(torch.rand(2, 3, 8, 8), (4, 4)).shape, resized(torch.rand(2, 3, 4, 4), (7, 7)).shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 3, 7, 7]))
    """
    height, width = size
    if maps.shape[2:] == (height, width):
        return maps
    if maps.shape[2] >= height and maps.shape[3] >= width:
        return F.adaptive_avg_pool2d(maps, (height, width))
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


@in_full_precision
def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)


def domain_vectors(loss: AlignmentLoss, source: Outputs, target: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return the vectors ``(B, C)`` of both domains, layer by layer; maps are averaged over their pixels.

    Args:
        loss: The loss, which names the layers.
        source: Outputs for the source's images.
        target: Outputs for the target's images, which may be more or fewer.

    Raises:
        ValueError: If no layer is named, or a layer returns one number per image.
    """
    if not loss.layers:
        raise UserError(f"{type(loss).__name__} compares features; name at least one layer in layers.")
    for name in loss.layers:
        if source.features[name].dim() < 2:
            raise UserError(f"{type(loss).__name__} needs more than one number (B,) of layer {name!r}; name another.")
    return [(pooled(source.features[name]), pooled(target.features[name])) for name in loss.layers]


def as_rows(source_features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten the features of both domains to ``(B, n)``.

    Raises:
        ValueError: If n differs.
    """
    source, target = source_features.flatten(1), target_features.flatten(1)
    if source.shape[1] != target.shape[1]:
        raise UserError(
            f"Domains are compared in one space, got {source.shape[1]} numbers per sample of the source and "
            f"{target.shape[1]} per sample of the target; read both from the same layer."
        )
    return source, target


def match_dtype(part: nn.Module, features: Tensor) -> Tensor:
    """Cast features to the type of a learned part's weights (under autocast its layers cast them again)."""
    return features.to(next(part.parameters(), features).dtype)


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


class SafeBatchNorm2d(nn.Module):
    """Batch norm that uses its running statistics where a channel has one single value and so no variance.

    That is a last batch of one image with a 1x1 map, for which ``nn.BatchNorm2d`` raises an error in training.

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
            return norm.forward(features)
        return F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class SafeBatchNorm1d(nn.Module):
    """:class:`SafeBatchNorm2d` of vectors.

    Args:
        channels: C of the ``(B, C)`` vectors.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.maps = SafeBatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(B, C)`` vectors."""
        normalized: Tensor = self.maps(features[:, :, None, None]).flatten(1)
        return normalized
