"""Kernel mean matching: importance weights with which the source has the target's mean in the space of a kernel."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_fraction
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._pairs import as_rows, domain_vectors
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
    *,
    bound: float = 10.0,
    tolerance: float = 0.1,
    ridge: float = 0.01,
    bandwidths: Sequence[float] = (0.5, 1.0, 2.0),
) -> Tensor:
    r"""Compute the source samples' weights that minimize the distance of the two domains' kernel means.

    .. math:: \min_w \Big\| \frac{1}{m} \sum_i w_i \phi(s_i) - \frac{1}{n} \sum_j \phi(t_j) \Big\|^2
              + \frac{\rho}{m} \sum_i w_i^2
              \quad \text{with} \quad 0 \le w_i \le b, \quad \Big| \frac{1}{m} \sum_i w_i - 1 \Big| \le \epsilon

    under the kernel of :func:`mmd_loss`. The ridge, which the paper does not have, makes the weights unique and smooth.
    It is a convex quadratic program, solved in float64 on the CPU: L-BFGS-B handles the box, and where the mean leaves
    its band, the multiplier that moves it back is the root of a monotone function.

    Args:
        source_features: ``(m, ...)``, flattened to vectors.
        target_features: ``(n, ...)``.
        bound: b >= 1, the largest weight.
        tolerance: :math:`\epsilon` in [0, 1].
        ridge: :math:`\rho` >= 1e-4, below which the solver is not exact.
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
    _check_arguments(bound, tolerance, ridge)
    source, target = as_rows(source_features, target_features)
    count = len(source)
    kernel = gaussian_kernel(torch.cat([source, target]).double(), bandwidths)[:count].cpu().numpy()
    if not np.isfinite(kernel).all():
        return source.new_full((count,), torch.nan)
    gram, kappa = kernel[:, :count] / count + ridge * np.eye(count), kernel[:, count:].mean(1)
    weights = _solve(gram, kappa, bound, tolerance)
    return torch.from_numpy(weights).to(source)


def _solve(gram: Array, kappa: Array, bound: float, tolerance: float) -> Array:
    """Minimize w'Gw / 2 - kappa'w within the box, with the mean of w within the band around 1; G is the paper's K."""
    from scipy.optimize import brentq  # loads for longer than all losses together

    weights = _in_box(gram, kappa, bound, np.ones(len(kappa)))
    excess = weights.mean() - 1
    if abs(excess) <= tolerance:
        return weights
    limit = 1 + tolerance * np.sign(excess)

    def excess_mean(multiplier: float) -> float:
        return float(_in_box(gram, kappa + multiplier, bound, weights).mean() - limit)

    # below the one all weights are 0, above the other all are at the bound
    lowest, highest = -kappa.max(), (bound * gram.sum(1) - kappa).max()
    multiplier = brentq(excess_mean, lowest - 1, highest + 1, xtol=1e-9)
    return _in_box(gram, kappa + multiplier, bound, weights)


def _in_box(gram: Array, kappa: Array, bound: float, start: Array) -> Array:
    from scipy.optimize import Bounds, minimize

    def objective(weights: Array) -> tuple[float, Array]:
        product = gram @ weights
        return float(product @ weights / 2 - kappa @ weights), product - kappa

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000, "maxfun": 10000}
    solution: Array = minimize(
        objective, start, jac=True, bounds=Bounds(0, bound), method="L-BFGS-B", options=options
    ).x
    return solution


def _check_arguments(bound: float, tolerance: float, ridge: float) -> None:
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

    The weights are computed for every batch from the features of a layer, which get no gradient from them. That takes
    some hundredths of a second for 128 samples on the CPU, during which the step waits. Nothing is learned.
    ``effective_sample_size`` of the weights is logged beside the term.

    Args:
        weight: Factor of the term in the weighted sum.
        layer: The pooled embedding by default. Maps ``(B, C, H, W)`` are averaged over their pixels.
        label_smoothing: Fraction of the target that is spread over all classes, in [0, 1].
        bound: See :func:`kernel_mean_matching`.
        tolerance: See :func:`kernel_mean_matching`.
        ridge: See :func:`kernel_mean_matching`.
        bandwidths: See :func:`mmd_loss`.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> source = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> target = Outputs(torch.rand(6, 10), {"avgpool": torch.rand(6, 8)})
        >>> loss = KernelMeanMatchingLoss()
        >>> loss(source, target, torch.tensor([3, 1, -1, 2])).shape, list(loss.metrics)
        (torch.Size([]), ['effective_sample_size'])
    """

    capturable = False  # the weights are computed on the host

    def __init__(
        self,
        *,
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
        check_fraction(label_smoothing=label_smoothing)
        if not bandwidths or not all(bandwidth > 0 for bandwidth in bandwidths):
            raise UserError(f"bandwidths must be numbers above 0, got {list(bandwidths)}.")
        _check_arguments(bound, tolerance, ridge)
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
        """Compute the term for one batch of source and target, see :class:`AlignmentLoss`."""
        active = self.gather and self.training
        ((source_vectors, target_vectors),) = domain_vectors(self, source, target)
        s, logits, labels = all_gather_grad(source_vectors.detach(), source.logits, labels, active=active)
        (t,) = all_gather_grad(target_vectors.detach(), active=active)
        weights = kernel_mean_matching(
            s, t, bound=self.bound, tolerance=self.tolerance, ridge=self.ridge, bandwidths=self.bandwidths
        )
        self.metrics = {"effective_sample_size": effective_sample_size(weights)}
        return hard_target_loss(logits, labels, label_smoothing=self.label_smoothing, weights=weights)
