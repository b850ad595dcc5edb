"""WKD-F: the distance of Gaussians fitted to both networks' maps, by mean and deviation of each channel."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._pairs import SafeBatchNorm2d, map_pairs, match_dtype, require_built
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def wkd_f_loss(
    fmap_student: Tensor, fmap_teacher: Tensor, *, mean_cov_ratio: float = 2.0, eps: float = 1e-5, grid: int = 1
) -> Tensor:
    r"""Compute the Wasserstein distance of Gaussians with diagonal covariance, fitted to the pixels of each window.

    .. math:: \frac{1}{g^2 B} \sum_{b, w, c} q \, (\mu^s_{bwc} - \mu^t_{bwc})^2 + (\sigma^s_{bwc} - \sigma^t_{bwc})^2

    over the g x g windows w of adaptive pooling, with :math:`\sigma^2` = unbiased variance + eps. The order of the
    pixels within a window changes nothing, and the maps may differ in size.

    Args:
        fmap_student: ``(B, C, H, W)``.
        fmap_teacher: ``(B, C, H', W')``.
        mean_cov_ratio: q, the weight of the means.
        eps: Added to the variances.
        grid: g, windows in either direction.

    Returns:
        A scalar >= 0, and 0 where means and deviations agree.

    Raises:
        UserError: If a window has a single pixel, which has no variance.

    Example:
        >>> maps = torch.rand(2, 3, 4, 4)
        >>> round(float(wkd_f_loss(maps + 1, maps, mean_cov_ratio=2.0)), 3)
        6.0
    """
    (s_means, s_deviations), (t_means, t_deviations) = (
        _gaussians(fmap, eps, grid) for fmap in (fmap_student, fmap_teacher)
    )
    means, deviations = (s_means - t_means).square(), (s_deviations - t_deviations).square()
    return (mean_cov_ratio * means + deviations).sum() / (grid**2 * len(fmap_student))


def wkd_f_conv1x1_loss(
    fmap_student: Tensor,
    fmap_teacher: Tensor,
    *,
    conv: nn.Module,
    bn: nn.Module,
    mean_cov_ratio: float = 2.0,
    eps: float = 1e-5,
    grid: int = 1,
) -> Tensor:
    """Compute :func:`wkd_f_loss` after ``conv``, ``bn`` and ReLU, which map the student to the teacher's channels.

    Args:
        fmap_student: ``(B, C, H, W)``.
        fmap_teacher: ``(B, C', H', W')``.
        conv: 1x1 convolution from C to C' channels.
        bn: Batch norm of C' channels.
        mean_cov_ratio: See :func:`wkd_f_loss`, as the others.
        eps: Added to the variances.
        grid: Windows in either direction.

    Example:
        >>> conv, bn = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        >>> wkd_f_conv1x1_loss(torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4), conv=conv, bn=bn).shape
        torch.Size([])
    """
    return _projected(nn.Sequential(conv, bn, nn.ReLU()), fmap_student, fmap_teacher, mean_cov_ratio, eps, grid)


def wkd_f_bottleneck_loss(
    fmap_student: Tensor,
    fmap_teacher: Tensor,
    *,
    conv1: nn.Module,
    conv2: nn.Module,
    conv3: nn.Module,
    bn: nn.Module,
    mean_cov_ratio: float = 2.0,
    eps: float = 1e-5,
    grid: int = 1,
) -> Tensor:
    """Compute :func:`wkd_f_loss` after three convolutions with nothing between them, ``bn`` and ReLU.

    Args:
        fmap_student: ``(B, C, H, W)``.
        fmap_teacher: ``(B, C', H', W')``.
        conv1: 1x1 convolution from C channels.
        conv2: 3x3 convolution with padding.
        conv3: 1x1 convolution to C' channels.
        bn: Batch norm of C' channels.
        mean_cov_ratio: See :func:`wkd_f_loss`, as the others.
        eps: Added to the variances.
        grid: Windows in either direction.

    Example:
        >>> convs = {"conv1": nn.Conv2d(3, 4, 1), "conv2": nn.Conv2d(4, 4, 3, padding=1), "conv3": nn.Conv2d(4, 5, 1)}
        >>> wkd_f_bottleneck_loss(torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4), bn=nn.BatchNorm2d(5), **convs).shape
        torch.Size([])
    """
    bottleneck = nn.Sequential(conv1, conv2, conv3, bn, nn.ReLU())
    return _projected(bottleneck, fmap_student, fmap_teacher, mean_cov_ratio, eps, grid)


def _gaussians(fmap: Tensor, eps: float, grid: int) -> tuple[Tensor, Tensor]:
    """Return means and deviations of the windows, ``(windows, B, C)``."""
    rows, columns = (_bounds(side, grid) for side in fmap.shape[2:])
    _check_windows(rows, columns, "wkd_f_loss", tuple(fmap.shape))
    if all(side % grid == 0 for side in fmap.shape[2:]):  # one operation in place of one for each window
        windows = fmap.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))
        variances, means = (v.flatten(2) for v in torch.var_mean(windows, (3, 5), correction=1))
    else:
        parts = [torch.var_mean(fmap[:, :, r, c], (2, 3), correction=1) for r in rows for c in columns]
        variances, means = (torch.stack(values, dim=2) for values in zip(*parts, strict=True))
    return means, (variances + eps).sqrt()


def _bounds(side: int, grid: int) -> list[slice]:
    """Return the windows of adaptive pooling along one side; they may overlap."""
    return [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]


def _check_windows(rows: list[slice], columns: list[slice], who: str, shape: tuple[int, ...]) -> None:
    smallest = min(r.stop - r.start for r in rows) * min(c.stop - c.start for c in columns)
    if smallest < 2:
        raise UserError(
            f"{who} needs windows of more than one pixel, since a pixel has no variance, got maps {shape} and "
            f"grid={len(rows)}; choose a smaller grid, or a layer with larger maps."
        )


class WKDFeatureLoss(DistillationLoss):
    """WKD-F, Wasserstein distance of features: :func:`wkd_f_conv1x1_loss`, summed over the layers.

    J. Lv, H. Yang, P. Li: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation,
    NeurIPS 2024, https://arxiv.org/abs/2412.08139; authors' code: https://github.com/JiamingLv/WKD

    Released with the schedule of the CRD benchmark (240 epochs) on CIFAR-100, and 100 epochs on ImageNet. Where the
    authors combine it with their loss on logits, both weights fall along half a cosine; here the weight is constant.
    The biases of the released convolutions, which have no effect before the batch norm, are left out.

    Args:
        weight: 0.08, as released for CIFAR-100 with ``mean_cov_ratio=4`` and one window (0.3 with 3 and a grid of 4;
            on ImageNet 0.02 and 0.005 with 2, a grid of 4 and the bottleneck).
        student_layers: The last map by default, as released.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        mean_cov_ratio: Weight of the means, against 1 of the deviations, >= 0.
        grid: Windows in either direction, >= 1.
        eps: Added to the variances, > 0.
        projector: Map from the student's channels to the teacher's: ``"conv1x1"``, or ``"bottleneck"`` for
            :func:`wkd_f_bottleneck_loss`.
        width: Channels within a bottleneck; 256 as released.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> student = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 8, 8, 8)})
        >>> teacher = Outputs(torch.rand(2, 10), {"layer3": torch.rand(2, 32, 8, 8)})
        >>> loss = WKDFeatureLoss(grid=2)
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 0.08,
        student_layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        mean_cov_ratio: float = 4.0,
        grid: int = 1,
        eps: float = 1e-5,
        projector: Literal["conv1x1", "bottleneck"] = "conv1x1",
        width: int = 256,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if not mean_cov_ratio >= 0 or not eps > 0:
            raise UserError(f"mean_cov_ratio must be >= 0 and eps above 0, got {mean_cov_ratio} and {eps}.")
        if grid < 1 or width < 1:
            raise UserError(f"grid and width must be >= 1, got {grid} and {width}.")
        if projector not in ("conv1x1", "bottleneck"):
            raise UserError(f"projector must be 'conv1x1' or 'bottleneck', got {projector!r}.")
        self.mean_cov_ratio = mean_cov_ratio
        self.grid = grid
        self.eps = eps
        self.projector = projector
        self.width = width
        self.projectors = nn.ModuleList()

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` for layers that give no maps, or maps too small for the windows."""
        for layer, pair in zip(self.student_layers, map_pairs(self, student, teacher, vectors=False), strict=True):
            for fmap in pair:
                rows, columns = (_bounds(side, self.grid) for side in fmap.shape[2:])
                _check_windows(rows, columns, f"WKDFeatureLoss on layer {layer!r}", tuple(fmap.shape))

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a projector for each pair of layers."""
        pairs = map_pairs(self, student, teacher, vectors=False)
        self.projectors = nn.ModuleList(self._projector(s.shape[1], t.shape[1]) for s, t in pairs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        parts = zip(require_built(self, self.projectors), map_pairs(self, student, teacher, vectors=False), strict=True)
        options = (self.mean_cov_ratio, self.eps, self.grid)
        return torch.stack([_projected(project, s, t, *options) for project, (s, t) in parts]).sum()

    def _projector(self, student_channels: int, teacher_channels: int) -> nn.Sequential:
        last: list[nn.Module] = [SafeBatchNorm2d(teacher_channels), nn.ReLU()]
        if self.projector == "conv1x1":
            return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 1, bias=False), *last)
        first = nn.Conv2d(student_channels, self.width, 1)  # whose bias ends where the next one pads with zeros
        middle = nn.Conv2d(self.width, self.width, 3, padding=1, bias=False)
        return nn.Sequential(first, middle, nn.Conv2d(self.width, teacher_channels, 1, bias=False), *last)


def _projected(
    projector: nn.Module, student: Tensor, teacher: Tensor, mean_cov_ratio: float, eps: float, grid: int
) -> Tensor:
    projected = projector(match_dtype(projector, student))
    return wkd_f_loss(projected, teacher, mean_cov_ratio=mean_cov_ratio, eps=eps, grid=grid)
