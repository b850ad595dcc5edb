"""Adversarial adaptation: a discriminator cannot distinguish the features of both domains."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._multilinear import MultilinearMap
from kd_lightning.losses._pairs import domain_vectors, match_dtype, require_built
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import AlignmentLoss


@in_full_precision
def adversarial_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    source_weights: Tensor | None = None,
    target_weights: Tensor | None = None,
) -> Tensor:
    r"""Compute the binary cross-entropy of classifying source (1) and target (0), each domain with weight one half.

    .. math:: -\frac{1}{2} \sum_b \frac{w^s_b}{\sum w^s} \log \sigma(z^s_b)
              -\frac{1}{2} \sum_b \frac{w^t_b}{\sum w^t} \log (1 - \sigma(z^t_b))

    The weights' sums are taken without gradient, as in CDAN's released code.

    Args:
        source_logits: The discriminator's z for the source, ``(B,)``.
        target_logits: The discriminator's z for the target, ``(B',)``.
        source_weights: Weights of the source's samples ``(B,)``, above 0; equal by default.
        target_weights: Weights of the target's samples ``(B',)``.

    Returns:
        A scalar >= 0, and log 2 where all logits are 0.

    Example:
        >>> adversarial_loss(torch.zeros(2), torch.zeros(3))
        tensor(0.6931)
    """
    return (_mean(F.softplus(-source_logits), source_weights) + _mean(F.softplus(target_logits), target_weights)) / 2


def _mean(errors: Tensor, weights: Tensor | None) -> Tensor:
    return errors.mean() if weights is None else (weights * errors).sum() / weights.sum().detach()


def reverse_gradient(features: Tensor, *, strength: float | Tensor = 1.0) -> Tensor:
    """Return the features unchanged, and multiply their gradient by ``-strength`` in the backward pass.

    Example:
        >>> features = torch.zeros(2, requires_grad=True)
        >>> reverse_gradient(features, strength=0.5).sum().backward()
        >>> features.grad
        tensor([-0.5000, -0.5000])
    """
    reversed_: Tensor = _Reversed.apply(features, strength)
    return reversed_


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float | Tensor) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reversal_strength(progress: Tensor) -> Tensor:
    r"""Compute Ganin's schedule :math:`\lambda_p = 2 / (1 + e^{-10 p}) - 1 = \tanh(5 p)`, from 0 to almost 1.

    Args:
        progress: p, the fraction of the training that is done, in [0, 1].

    Example:
        >>> reversal_strength(torch.tensor([0.0, 0.1, 1.0]))
        tensor([0.0000, 0.4621, 0.9999])
    """
    return torch.tanh(5 * progress)


@in_full_precision
def entropy_weights(logits: Tensor) -> Tensor:
    """Compute confidence weights, 1 + exp(-entropy) of the softmax of ``(B, C)`` logits, in (1, 2].

    Example:
        >>> entropy_weights(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
        tensor([1.5000, 2.0000])
    """
    log_probabilities = logits.log_softmax(1)
    return 1 + (log_probabilities.exp() * log_probabilities).sum(1).exp()


class AdversarialLoss(AlignmentLoss):
    """Domain-adversarial training (DANN), and with ``conditional=True`` its conditional form (CDAN), over the layers.

    A discriminator, a small perceptron that trains with the network, minimizes :func:`adversarial_loss`; through
    :func:`reverse_gradient` the network maximizes it, with a strength that rises by :func:`reversal_strength` of
    ``progress``. At equilibrium its accuracy, logged as ``domain_accuracy``, is that of chance, 0.5.

    Y. Ganin, V. Lempitsky: Unsupervised Domain Adaptation by Backpropagation, ICML 2015,
    https://arxiv.org/abs/1409.7495; authors' code: https://github.com/ddtm/caffe
    M. Long et al.: Conditional Adversarial Domain Adaptation, NeurIPS 2018, https://arxiv.org/abs/1705.10667;
    authors' code: https://github.com/thuml/CDAN

    CDAN's discriminator sees features times predicted probabilities, see :class:`MultilinearMap`; as released, the
    probabilities carry no gradient there. Unlike the released discriminators this one has no dropout, and it learns at
    the optimizer's rate and not at ten times that.

    Args:
        weight: 1, as released.
        layers: The pooled embedding by default. Maps ``(B, C, H, W)`` are averaged over their pixels.
        conditional: Condition the discriminator on the predictions (CDAN).
        entropy_weighted: Weight samples by :func:`entropy_weights` of their predictions (CDAN+E); the gradient through
            the weights is reversed as well.
        hidden: Units in either hidden layer of a discriminator; 1024 as released.
        strength: Factor of the reversed gradient at the end of training, >= 0.
        largest_product: Features times classes above which the product is a random map; 4096 as published.
        random_dimensions: Size of that map; 1024 as released.
        gather: Whether to average over the batch of all ranks, and not over each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value. It slows the discriminator as well;
            better leave it at 0.

    Raises:
        ValueError: If the strength is negative, or one of the sizes is below 1.

    Example:
        >>> source = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> target = Outputs(torch.rand(6, 10), {"avgpool": torch.rand(6, 8)})
        >>> loss = AdversarialLoss(conditional=True, hidden=16)
        >>> loss.build(source, target)
        >>> loss.progress = torch.tensor(0.5)
        >>> loss(source, target, torch.tensor([3, 1, 0, 2])).shape, list(loss.metrics)
        (torch.Size([]), ['domain_accuracy'])
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        layers: Sequence[str] = ("avgpool",),
        conditional: bool = False,
        entropy_weighted: bool = False,
        hidden: int = 1024,
        strength: float = 1.0,
        largest_product: int = 4096,
        random_dimensions: int = 1024,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, layers=layers, warmup_epochs=warmup_epochs)
        if not strength >= 0:
            raise UserError(f"strength must be >= 0, got {strength}.")
        if min(hidden, largest_product, random_dimensions) < 1:
            raise UserError(
                "hidden, largest_product and random_dimensions must be >= 1, "
                f"got {hidden}, {largest_product} and {random_dimensions}."
            )
        self.conditional = conditional
        self.entropy_weighted = entropy_weighted
        self.hidden = hidden
        self.strength = strength
        self.largest_product = largest_product
        self.random_dimensions = random_dimensions
        self.gather = gather
        self.conditions = nn.ModuleList()
        self.discriminators = nn.ModuleList()

    def build(self, source: Outputs, target: Outputs, **networks: nn.Module | None) -> None:
        """Create a discriminator for each layer."""
        widths = [source.shape[1] for source, _ in domain_vectors(self, source, target)]
        if self.conditional:
            classes = source.logits.shape[1]
            maps = [MultilinearMap(w, classes, self.largest_product, self.random_dimensions) for w in widths]
            self.conditions = nn.ModuleList(maps)
            widths = [condition.dimensions for condition in maps]
        self.discriminators = nn.ModuleList(_discriminator(width, self.hidden) for width in widths)

    def forward(self, source: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch of source and target, see :class:`AlignmentLoss`."""
        strength = self.strength * reversal_strength(self.progress)
        terms, hits = [], []
        for i, pair in enumerate(domain_vectors(self, source, target)):
            (s, s_weights), (t, t_weights) = (
                self._discriminate(i, vectors, outputs.logits, strength)
                for vectors, outputs in zip(pair, (source, target), strict=True)
            )
            terms.append(adversarial_loss(s, t, s_weights, t_weights))
            hits.append(((s > 0).float().mean() + (t <= 0).float().mean()) / 2)
        self.metrics = {"domain_accuracy": torch.stack(hits).mean()}
        return torch.stack(terms).sum()

    def _discriminate(
        self, layer: int, vectors: Tensor, predictions: Tensor, strength: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the discriminator's logits and the weights of all ranks' samples of a domain."""
        vectors = reverse_gradient(vectors, strength=strength)
        predictions = reverse_gradient(predictions, strength=strength)
        discriminator = require_built(self, self.discriminators)[layer]
        weights = entropy_weights(predictions) if self.entropy_weighted else vectors.new_ones(len(vectors))
        if self.conditional:
            vectors = self.conditions[layer](vectors, predictions.detach())
        logits = discriminator(match_dtype(discriminator, vectors)).squeeze(1)
        logits, weights = all_gather_grad(logits, weights, active=self.gather and self.training)
        return logits, weights


def _discriminator(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )
