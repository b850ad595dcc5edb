"""Maximum mean discrepancy: both domains have the same mean in the space of a kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._pairs import as_rows, domain_vectors
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import AlignmentLoss


@in_full_precision
def mmd_loss(
    source_features: Tensor,
    target_features: Tensor,
    *,
    bandwidths: Sequence[float] = (0.5, 1.0, 2.0),
    unbiased: bool = True,
) -> Tensor:
    r"""Compute the squared distance of the two domains' means in the space of a sum of Gaussian kernels.

    .. math:: \frac{\sum_{i \ne j} k(s_i, s_j)}{m (m - 1)} + \frac{\sum_{i \ne j} k(t_i, t_j)}{n (n - 1)}
              - \frac{2 \sum_{ij} k(s_i, t_j)}{m n},
              \qquad k(x, y) = \sum_a \exp \Big( -\frac{\|x - y\|^2}{2 a \sigma^2} \Big)

    with :math:`\sigma^2` the mean of all :math:`(m + n)^2` squared distances, without gradient. The biased form is a
    squared distance: it counts the pairs i = j as well and divides by :math:`m^2` and :math:`n^2`. A shift, a rotation
    or a factor on all features changes nothing. Transfer-Learning-Library adds 2 / (m - 1) to the unbiased form.

    Args:
        source_features: ``(m, ...)``, flattened to vectors.
        target_features: ``(n, ...)``.
        bandwidths: The factors a, each above 0.
        unbiased: Whether the estimate has mean 0 where both domains are equal; it may then be negative, and it is 0
            where a domain has one sample and therefore no pair.

    Raises:
        ValueError: If the widths differ.

    Example:
        >>> source, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0], [4.0]])
        >>> mmd_loss(source, target)
        tensor(2.0428)
    """
    source, target = as_rows(source_features, target_features)
    m, n = len(source), len(target)
    kernel = gaussian_kernel(torch.cat([source, target]), bandwidths)
    own = 0
    if unbiased:
        kernel = kernel - torch.diag(kernel.diagonal())
        own = 1
        if min(m, n) < 2:
            return 0 * kernel.sum()
    within = kernel[:m, :m].sum() / (m * (m - own)) + kernel[m:, m:].sum() / (n * (n - own))
    return within - 2 * kernel[:m, m:].mean()


def gaussian_kernel(rows: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Compute the kernel of :func:`mmd_loss` between all rows ``(N, n)``, an ``(N, N)`` matrix."""
    # differences, since inner products of close rows cancel
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    scale = 2 * distances.detach().mean().clamp(min=torch.finfo(rows.dtype).tiny)
    return torch.stack([torch.exp(-distances / (bandwidth * scale)) for bandwidth in bandwidths]).sum(0)


class MMDLoss(AlignmentLoss):
    """Deep adaptation by maximum mean discrepancy (DAN): :func:`mmd_loss`, summed over the layers.

    M. Long et al.: Learning Transferable Features with Deep Adaptation Networks, ICML 2015,
    https://arxiv.org/abs/1502.02791; the form is that of Transfer-Learning-Library,
    https://github.com/thuml/Transfer-Learning-Library, in which the kernels have equal weights

    Args:
        weight: 1, as in Transfer-Learning-Library.
        layers: The pooled embedding by default. Maps ``(B, C, H, W)`` are averaged over their pixels.
        bandwidths: See :func:`mmd_loss`.
        unbiased: See :func:`mmd_loss`.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If there are no bandwidths, or one is not above 0.

    Example:
        >>> source = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> target = Outputs(torch.rand(6, 10), {"avgpool": torch.rand(6, 8)})
        >>> MMDLoss()(source, target, torch.tensor([3, 1, 0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        layers: Sequence[str] = ("avgpool",),
        bandwidths: Sequence[float] = (0.5, 1.0, 2.0),
        unbiased: bool = True,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, layers=layers, warmup_epochs=warmup_epochs)
        if not bandwidths or not all(bandwidth > 0 for bandwidth in bandwidths):
            raise UserError(f"bandwidths must be numbers above 0, got {list(bandwidths)}.")
        self.bandwidths = tuple(bandwidths)
        self.unbiased = unbiased
        self.gather = gather

    def check(self, source: Outputs, target: Outputs) -> None:
        """Raise a ``UserError`` for layers that give no vectors."""
        domain_vectors(self, source, target)

    def forward(self, source: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch of source and target, see :class:`AlignmentLoss`."""
        active = self.gather and self.training
        pairs = [
            all_gather_grad(s, active=active) + all_gather_grad(t, active=active)
            for s, t in domain_vectors(self, source, target)
        ]
        return torch.stack([mmd_loss(s, t, bandwidths=self.bandwidths, unbiased=self.unbiased) for s, t in pairs]).sum()
