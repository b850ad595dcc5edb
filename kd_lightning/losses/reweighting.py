"""Importance weights from a domain classifier: source samples that resemble the target count for more."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_fraction
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._pairs import domain_vectors, match_dtype, require_built
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import AlignmentLoss
from kd_lightning.losses.hard_target import hard_target_loss


@in_full_precision
def density_ratio(logits: Tensor, *, source_size: int, target_size: int, bound: float = 10.0) -> Tensor:
    r"""Compute how much more probable samples are in the target than in the source, from a domain classifier.

    .. math:: \frac{p_t(x)}{p_s(x)} = \frac{m}{n} e^{-z(x)}, \qquad
              z(x) = \log \frac{P(\text{source} \mid x)}{P(\text{target} \mid x)}

    (Bayes' rule), clamped to a bound and then divided by the mean over the samples.

    Args:
        logits: The classifier's z for samples of the source, ``(B,)``.
        source_size: m, the number of source samples from which the classifier learns for every n of the target.
        target_size: n, the number of target samples.
        bound: Largest ratio before the division, >= 1.

    Returns:
        Weights ``(B,)`` of mean 1.

    Example:
        >>> density_ratio(torch.tensor([0.0, 0.0, math.log(4.0)]), source_size=50, target_size=50)
        tensor([1.3333, 1.3333, 0.3333])
    """
    logarithms = (math.log(source_size / target_size) - logits).clamp(max=math.log(bound))
    return len(logits) * logarithms.softmax(0)  # all of them may be too small for their exponentials


@in_full_precision
def effective_sample_size(weights: Tensor) -> Tensor:
    r"""Compute the number of equally weighted samples with the same variance, :math:`(\sum w)^2 / \sum w^2`.

    Args:
        weights: Weights of the samples ``(B,)``, >= 0.

    Returns:
        A scalar from 1 to B; 0 where all weights are 0.

    Example:
        >>> effective_sample_size(torch.tensor([2.0, 2.0, 0.0]))
        tensor(2.)
    """
    scaled = weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
    return scaled.sum().square() / scaled.square().sum().clamp(min=torch.finfo(weights.dtype).tiny)


class ReweightedLoss(AlignmentLoss):
    """The source's cross-entropy, weighted by :func:`density_ratio`; it takes the place of :class:`HardTargetLoss`.

    S. Bickel, M. Brückner, T. Scheffer: Discriminative Learning for Differing Training and Test Distributions,
    ICML 2007, https://doi.org/10.1145/1273496.1273507

    The ratio is that of a domain classifier, which reads the features of a layer without moving them. It learns
    inside the term: its binary cross-entropy and penalty are added, and the weights carry no gradient. It begins with
    weights of 1. Samples are weighted before the classifier learns from them. Its features have variance 1 in the
    batch and are divided by the root of their number, so that one learning rate suits all layers.

    Weights are only as good as the classifier's probabilities. A logistic regression is calibrated in the mean by its
    own objective, and the penalty draws it, where data are few, towards equal weights. (A temperature would have to be
    fitted to samples that are left out in every epoch, which a loss cannot know.)

    Logged beside it: ``effective_sample_size`` of the weights, and ``domain_accuracy``. Near 1 the domains hardly
    overlap, and no weights can help.

    Args:
        weight: Factor of the term in the weighted sum.
        layer: The pooled embedding by default. Maps ``(B, C, H, W)`` are averaged over their pixels.
        label_smoothing: Fraction of the target that is spread over all classes, in [0, 1].
        bound: Largest ratio, >= 1.
        penalty: Factor of half the classifier's squared weights in its loss, >= 0.
        hidden: Number of units of a hidden layer; 0 for a logistic regression.
        gather: Whether to compare within the batch of all ranks, and not within each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> source = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> target = Outputs(torch.rand(6, 10), {"avgpool": torch.rand(6, 8)})
        >>> loss = ReweightedLoss()
        >>> loss.build(source, target)
        >>> loss(source, target, torch.tensor([3, 1, -1, 2])).shape
        torch.Size([])
        >>> loss.metrics["effective_sample_size"]
        tensor(4.)
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        layer: str = "avgpool",
        label_smoothing: float = 0.0,
        bound: float = 10.0,
        penalty: float = 1e-3,
        hidden: int = 0,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, layers=[layer], warmup_epochs=warmup_epochs)
        check_fraction(label_smoothing=label_smoothing)
        if not bound >= 1:
            raise UserError(f"bound must be >= 1, got {bound}.")
        if not penalty >= 0 or hidden < 0:
            raise UserError(f"penalty and hidden must be >= 0, got {penalty} and {hidden}.")
        self.label_smoothing = label_smoothing
        self.bound = bound
        self.penalty = penalty
        self.hidden = hidden
        self.gather = gather
        self.classifiers = nn.ModuleList()

    def build(self, source: Outputs, target: Outputs, **networks: nn.Module | None) -> None:
        """Create the domain classifier."""
        ((vectors, _),) = domain_vectors(self, source, target)
        width = vectors.shape[1]
        last = nn.Linear(self.hidden or width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = [nn.Linear(width, self.hidden), nn.ReLU()] if self.hidden else []
        self.classifiers = nn.ModuleList([nn.Sequential(*first, last)])

    def forward(self, source: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch of source and target, see :class:`AlignmentLoss`."""
        active = self.gather and self.training
        ((source_vectors, target_vectors),) = domain_vectors(self, source, target)
        s, logits, labels = all_gather_grad(source_vectors.detach(), source.logits, labels, active=active)
        (t,) = all_gather_grad(target_vectors.detach(), active=active)
        (classifier,) = require_built(self, self.classifiers)
        odds = classifier(match_dtype(classifier, _standardized(s, t))).squeeze(1)
        of_source = torch.arange(len(odds), device=odds.device) < len(s)
        weights = density_ratio(odds.detach()[: len(s)], source_size=len(s), target_size=len(t), bound=self.bound)
        self.metrics = {
            "effective_sample_size": effective_sample_size(weights),
            "domain_accuracy": ((odds > 0) == of_source).float().mean(),
        }
        squares = torch.stack([p.square().sum() for p in classifier.parameters() if p.dim() == 2]).sum()
        learned = _domain_error(odds, of_source) + self.penalty / 2 * squares
        return hard_target_loss(logits, labels, label_smoothing=self.label_smoothing, weights=weights) + learned


def _standardized(source: Tensor, target: Tensor) -> Tensor:
    rows = torch.cat([source, target])
    difference = rows - rows.mean(0)
    deviations = difference.square().mean(0).sqrt().clamp(min=torch.finfo(rows.dtype).tiny)
    return difference / (deviations * math.sqrt(rows.shape[1]))


@in_full_precision
def _domain_error(odds: Tensor, of_source: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(odds, of_source.to(odds.dtype))
