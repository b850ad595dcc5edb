"""ViTKD: shallow tokens are mimicked, deep ones generated behind a random mask."""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Grid, Outputs, maps_to_tokens, tokens_to_maps
from kd_lightning.losses._pairs import map_pairs, match_dtype, resized
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


def vitkd_loss(
    low_student: Tensor,
    high_student: Tensor,
    low_teacher: Tensor,
    high_teacher: Tensor,
    noise: Tensor,
    masked: Tensor | None = None,
    *,
    align2: nn.ModuleList | None = None,
    align: nn.Module | None = None,
    mask_token: Tensor,
    generation: nn.Module,
    alpha: float = 3e-5,
    beta: float = 3e-6,
    mask_ratio: float = 0.5,
) -> Tensor:
    r"""Compute the squared error of shallow tokens, and of deep ones that are generated from those not masked.

    .. math:: \frac{\alpha}{B} \sum \| A_l(s_l) - t_l \|^2 + \frac{\beta}{r B} \sum_{n \,\text{masked}}
              \| G(x)_n - t_n \|^2

    with x the aligned deep tokens, masked ones replaced by the mask token. Both are sums over tokens and widths,
    divided by the batch alone, hence the small weights.

    Args:
        low_student: Tokens of shallow layers, ``(B, layers, N, D)``, without class tokens.
        high_student: Tokens of the last layer, ``(B, N, D)``.
        low_teacher: ``(B, layers, N, D')``.
        high_teacher: ``(B, N, D')``.
        noise: Random numbers ``(B, N)``; the ``int(N (1 - r))`` smallest of an image stay.
        masked: Mask ``(B, N)`` in place of the one that follows from the noise.
        align2: Layer from D to D' for each shallow layer; ``None`` where both are equal.
        align: Layer from D to D'; ``None`` where both are equal.
        mask_token: ``(1, 1, D')``.
        generation: Module of maps ``(B, D', H, W)``; as released two 3x3 convolutions with a ReLU between them.
        alpha: Weight of the shallow layers.
        beta: Weight of the last layer.
        mask_ratio: r, in (0, 1).

    Raises:
        UserError: If N is not that of a square grid.

    Example:
        >>> tokens, noise = torch.rand(2, 9, 4), torch.rand(2, 9)
        >>> shallow, conv = torch.stack([tokens, tokens], dim=1), nn.Conv2d(4, 4, 3, padding=1)
        >>> vitkd_loss(shallow, tokens, shallow, tokens, noise, mask_token=torch.zeros(1, 1, 4), generation=conv).shape
        torch.Size([])
    """
    count = high_student.shape[1]
    if isqrt(count) ** 2 != count:
        raise UserError(f"vitkd_loss lays tokens out on a square grid, got {count}; leave out class tokens.")
    shallow = list(zip(low_student.unbind(1), low_teacher.unbind(1), strict=True))
    aligned = [s if align2 is None else align2[i](match_dtype(align2, s)) for i, (s, _) in enumerate(shallow)]
    mimicked = [_squared_error(a, t) for a, (_, t) in zip(aligned, shallow, strict=True)]
    deep = high_student if align is None else align(match_dtype(align, high_student))
    hidden = masked_places(noise, mask_ratio) if masked is None else masked
    grid = Grid(0, isqrt(count), isqrt(count))
    generated = _generate(deep, hidden, mask_token, generation, grid)
    error = _masked_squared_error(generated, high_teacher, hidden)
    return alpha * torch.stack(mimicked).sum() + beta / mask_ratio * error


def masked_places(noise: Tensor, mask_ratio: float) -> Tensor:
    """Return the mask ``(B, N)`` of the tokens that are hidden: all but the ``int(N (1 - mask_ratio))`` smallest.

    Example:
        >>> masked_places(torch.tensor([[0.3, 0.1, 0.4, 0.2]]), 0.5)
        tensor([[ True, False,  True, False]])
    """
    stay = int(noise.shape[1] * (1 - mask_ratio))
    return noise.argsort(1).argsort(1) >= stay


def _generate(deep: Tensor, masked: Tensor, mask_token: Tensor, generation: nn.Module, grid: Grid) -> Tensor:
    shown = torch.where(masked[:, :, None], mask_token.to(deep.dtype), deep)
    generated: Tensor = generation(match_dtype(generation, tokens_to_maps(shown, grid)))
    return maps_to_tokens(generated)


@in_full_precision
def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum() / len(student)


@in_full_precision
def _masked_squared_error(student: Tensor, teacher: Tensor, masked: Tensor) -> Tensor:
    return ((student - teacher).square() * masked[:, :, None]).sum() / len(student)


class ViTKDLoss(DistillationLoss):
    """ViTKD: :func:`vitkd_loss`, all layers but the last being mimicked and the last one generated.

    Z. Yang et al.: ViTKD: Feature-based Knowledge Distillation for Vision Transformers, CVPR Workshops 2024,
    https://arxiv.org/abs/2209.02432; authors' code: https://github.com/yzd-v/cls_KD

    Class, distillation and register tokens are left out. Where the grids differ, the student's is resized to the
    teacher's; maps of CNNs are read as tokens. The mask is drawn again in each step. As released it stands beside
    NKD with gamma 1, in DeiT's schedule on ImageNet, 300 epochs of AdamW.

    Args:
        weight: Factor of both parts.
        student_layers: Layers from shallow to deep, at least two. As released for ViTs the outputs of the first two
            blocks and the last output after its norm (``blocks.0``, ``blocks.1``, ``norm`` in timm).
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        alpha: Weight of the shallow layers, >= 0; 3e-5 as released.
        beta: Weight of the last layer, >= 0; 3e-6 as released.
        mask_ratio: Share of the tokens that are hidden, in (0, 1); 0.5 as released.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If an argument lies outside its range, or fewer than two layers are named.

    Example:
        >>> names = ["blocks.0", "blocks.1", "norm"]
        >>> student = Outputs(torch.rand(2, 10), {name: torch.rand(2, 17, 8) for name in names})
        >>> teacher = Outputs(torch.rand(2, 10), {name: torch.rand(2, 17, 16) for name in names})
        >>> loss = ViTKDLoss(student_layers=names)
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("blocks.0", "blocks.1", "norm"),
        teacher_layers: Sequence[str] | None = None,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if len(self.student_layers) < 2:
            raise UserError(f"ViTKDLoss reads shallow layers and a last one, got {list(self.student_layers)}.")
        if not (alpha >= 0 and beta >= 0 and 0 < mask_ratio < 1):
            raise UserError(
                f"alpha and beta must be >= 0 and mask_ratio in (0, 1), got {alpha}, {beta} and {mask_ratio}."
            )
        self.alpha = alpha
        self.beta = beta
        self.mask_ratio = mask_ratio
        self.aligns = nn.ModuleList()
        self.generation = nn.Sequential()
        self.mask_token: nn.Parameter | None = None

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create the aligning layers, the mask token and the generator."""
        widths = [(s.shape[1], t.shape[1]) for s, t in map_pairs(self, student, teacher, vectors=False)]
        self.aligns = nn.ModuleList(nn.Identity() if s == t else nn.Linear(s, t) for s, t in widths)
        width = widths[-1][1]
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.generation = nn.Sequential(convs[0], nn.ReLU(), convs[1])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        if self.mask_token is None:
            raise RuntimeError("The learned parts of ViTKDLoss are not built yet; call build before the first step.")
        pairs = map_pairs(self, student, teacher, vectors=False)
        height, width = pairs[-1][1].shape[2:]
        tokens = [(maps_to_tokens(resized(s, t.shape[2:])), maps_to_tokens(t)) for s, t in pairs]
        aligned = [align(match_dtype(align, s)) for align, (s, _) in zip(self.aligns, tokens, strict=True)]
        *low, high = [t for _, t in tokens]
        mimicked = torch.stack([_squared_error(a, t) for a, t in zip(aligned, low, strict=False)]).sum()
        masked = masked_places(torch.rand(high.shape[:2], device=high.device), self.mask_ratio)
        generated = _generate(aligned[-1], masked, self.mask_token, self.generation, Grid(0, height, width))
        error = _masked_squared_error(generated, high, masked)
        return self.alpha * mimicked + self.beta / self.mask_ratio * error
