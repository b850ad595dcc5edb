"""Kernel mean matching: importance weights with which the source has the target's mean in the space of a kernel."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._domains import as_rows, domain_vectors
from kd_lightning.losses._gather import gathered
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import AlignmentLoss
from kd_lightning.losses.hard_target import hard_target_loss
from kd_lightning.losses.mmd import gaussian_kernel
from kd_lightning.losses.reweighting import effective_sample_size

Array = NDArray[np.float64]

_LEAST_RIDGE = 1e-4


@torch.no_grad()
@in_full_precision
def kernel_mean_matching(
    source_features: Tensor,
    target_features: Tensor,
    bound: float = 10.0,
    tolerance: float = 0.1,
    ridge: float = 0.01,
    bandwidths: Sequence[float] = (0.5, 1.0, 2.0),
) -> Tensor:
    r"""The weights of the source's samples that minimize the distance of the two domains' kernel means.

    .. math:: \min_w \Big\| \frac{1}{m} \sum_i w_i \phi(s_i) - \frac{1}{n} \sum_j \phi(t_j) \Big\|^2
              + \frac{\rho}{m} \sum_i w_i^2
              \quad \text{with} \quad 0 \le w_i \le b, \quad \Big| \frac{1}{m} \sum_i w_i - 1 \Big| \le \epsilon

    under the kernel of :func:`mmd_loss`. The ridge, which the paper has not, makes the weights unique and smooth. It is
    a convex quadratic programme, solved in float64 on the CPU: L-BFGS-B keeps to the box, and where the mean leaves its
    band, the multiplier that brings it back is the root of a monotone function.

    Args:
        source_features: ``(m, ...)``, flattened to vectors.
        target_features: ``(n, ...)``.
        bound: b >= 1, the largest weight.
        tolerance: :math:`\epsilon` in [0, 1].
        ridge: :math:`\rho` >= 1e-4, below which the solver is no longer exact.
        bandwidths: See :func:`mmd_loss`.

    Returns:
        Weights ``(m,)`` without gradient; NaN where the features are not finite.

    Raises:
        ValueError: If the widths differ, or another argument lies outside its range.

    Example:
        >>> source, target = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.0], [2.0], [1.0]])
        >>> kernel_mean_matching(source, target, tolerance=0.0)
        tensor([0.0123, 1.0000, 1.9877])
    """
    _check(bound, tolerance, ridge)
    source, target = as_rows(source_features, target_features)
    count = len(source)
    kernel = gaussian_kernel(torch.cat([source, target]).double(), bandwidths)[:count].cpu().numpy()
    if not np.isfinite(kernel).all():
        return source.new_full((count,), torch.nan)
    among = kernel[:, :count] / count + ridge * np.eye(count)
    weights = _solve(among, kernel[:, count:].mean(1), bound, tolerance)
    return torch.from_numpy(weights).to(source)


def _solve(among: Array, towards: Array, bound: float, tolerance: float) -> Array:
    """Minimize w'Aw / 2 - t'w within the box, with the mean of w within the band around 1."""
    from scipy.optimize import brentq  # loads for longer than all losses together

    weights = _in_box(among, towards, bound, np.ones(len(towards)))
    excess = weights.mean() - 1
    if abs(excess) <= tolerance:
        return weights
    limit = 1 + tolerance * np.sign(excess)

    def beyond(multiplier: float) -> float:
        return float(_in_box(among, towards + multiplier, bound, weights).mean()) - limit

    # below the one all weights are 0, above the other all are at the bound
    lowest, highest = -towards.max(), (bound * among.sum(1) - towards).max()
    multiplier = brentq(beyond, lowest - 1, highest + 1, xtol=1e-9)
    return _in_box(among, towards + multiplier, bound, weights)


def _in_box(among: Array, towards: Array, bound: float, start: Array) -> Array:
    from scipy.optimize import Bounds, minimize

    def objective(weights: Array) -> tuple[float, Array]:
        pull = among @ weights
        return float(pull @ weights / 2 - towards @ weights), pull - towards

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000, "maxfun": 10000}
    return minimize(objective, start, jac=True, bounds=Bounds(0, bound), method="L-BFGS-B", options=options).x


def _check(bound: float, tolerance: float, ridge: float) -> None:
    if not bound >= 1:
        raise UserError(f"bound must be >= 1, since weights have mean 1, got {bound}.")
    if not 0 <= tolerance <= 1:
        raise UserError(f"tolerance must lie in [0, 1], got {tolerance}.")
    if not ridge >= _LEAST_RIDGE:
        raise UserError(f"ridge must be >= {_LEAST_RIDGE}, got {ridge}.")


class KernelMeanMatchingLoss(AlignmentLoss):
    """The source's cross-entropy, weighted by :func:`kernel_mean_matching`; it replaces :class:`HardTargetLoss`.

    J. Huang et al.: Correcting Sample Selection Bias by Unlabeled Data, NeurIPS 2006,
    https://papers.nips.cc/paper/3075-correcting-sample-selection-bias-by-unlabeled-data

    The weights are found anew for every batch, from the features of a layer, which are not moved. That takes some
    hundredths of a second for 128 samples, on the CPU, for which a step has to wait. Nothing is learned.
    ``effective_sample_size`` of the weights is logged beside the term.

    Args:
        weight: Of the term.
        layer: The pooled embedding by default. Maps ``(B, C, H, W)`` are averaged over their pixels.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].
        bound: See :func:`kernel_mean_matching`.
        tolerance: See :func:`kernel_mean_matching`.
        ridge: See :func:`kernel_mean_matching`.
        bandwidths: See :func:`mmd_loss`.
        gather: Use the batch of all ranks and not the rank's own.
        warmup_epochs: See :class:`AlignmentLoss`.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> source = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> target = Outputs(torch.rand(6, 10), {"avgpool": torch.rand(6, 8)})
        >>> loss = KernelMeanMatchingLoss()
        >>> loss(source, target, torch.tensor([3, 1, -1, 2])).shape, list(loss.metrics)
        (torch.Size([]), ['effective_sample_size'])
    """

    def __init__(
        self,
        weight: float = 1.0,
        layer: str = "avgpool",
        label_smoothing: float = 0.0,
        bound: float = 10.0,
        tolerance: float = 0.1,
        ridge: float = 0.01,
        bandwidths: Sequence[float] = (0.5, 1.0, 2.0),
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, layers=[layer], warmup_epochs=warmup_epochs)
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing must lie in [0, 1], got {label_smoothing}.")
        if not bandwidths or not all(bandwidth > 0 for bandwidth in bandwidths):
            raise UserError(f"bandwidths must be numbers above 0, got {list(bandwidths)}.")
        _check(bound, tolerance, ridge)
        self.label_smoothing = label_smoothing
        self.bound = bound
        self.tolerance = tolerance
        self.ridge = ridge
        self.bandwidths = tuple(bandwidths)
        self.gather = gather

    def check(self, source: Outputs, target: Outputs) -> None:
        """Raise a ``UserError`` for a layer that gives no vectors."""
        domain_vectors(self, source, target)

    def forward(self, source: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        """The term for one batch of source and target, see :class:`AlignmentLoss`."""
        active = self.gather and self.training
        ((source_vectors, target_vectors),) = domain_vectors(self, source, target)
        s, logits, labels = gathered(active, source_vectors.detach(), source.logits, labels)
        (t,) = gathered(active, target_vectors.detach())
        weights = kernel_mean_matching(s, t, self.bound, self.tolerance, self.ridge, self.bandwidths)
        self.metrics = {"effective_sample_size": effective_sample_size(weights)}
        return hard_target_loss(logits, labels, self.label_smoothing, weights)
