"""Products of features and predictions, the input of a conditional discriminator."""

import math

import torch
from torch import Tensor, nn

from kd_lightning.losses._precision import in_full_precision


@in_full_precision
def outer_product(features: Tensor, probabilities: Tensor) -> Tensor:
    """Multiply every feature by every probability, class by class.

    Args:
        features: ``(B, d)``.
        probabilities: ``(B, C)``.

    Returns:
        ``(B, C * d)``.

    Example:
        >>> outer_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]]))
        tensor([[0.2500, 0.5000, 0.7500, 1.5000]])
    """
    return (probabilities[:, :, None] * features[:, None]).flatten(1)


@in_full_precision
def random_product(features: Tensor, probabilities: Tensor, feature_map: Tensor, probability_map: Tensor) -> Tensor:
    r"""Compute a random map of the outer product, which preserves inner products in expectation.

    .. math:: \frac{1}{\sqrt D} (f R_f) \odot (p R_p)

    Args:
        features: ``(B, d)``.
        probabilities: ``(B, C)``.
        feature_map: :math:`R_f` with standard normal entries, ``(d, D)``.
        probability_map: :math:`R_p`, ``(C, D)``.

    Returns:
        ``(B, D)``.
    """
    mapped: Tensor = (features @ feature_map.to(features)) * (probabilities @ probability_map.to(probabilities))
    return mapped / math.sqrt(feature_map.shape[1])


class MultilinearMap(nn.Module):
    """The outer product of features and predicted probabilities, or a random map of it where that is too large.

    M. Long et al.: Conditional Adversarial Domain Adaptation, NeurIPS 2018, https://arxiv.org/abs/1705.10667;
    authors' code: https://github.com/thuml/CDAN

    Args:
        width: d, the number of features.
        classes: C, the number of classes.
        largest: Number of products above which the map is random.
        random_dimensions: D, the size of the random map.
    """

    feature_map: Tensor
    probability_map: Tensor

    def __init__(self, width: int, classes: int, largest: int, random_dimensions: int) -> None:
        super().__init__()
        self.random = width * classes > largest
        self.dimensions = random_dimensions if self.random else width * classes
        if self.random:
            generator = torch.Generator().manual_seed(0)  # the same on all ranks, among which buffers are not sent
            self.register_buffer("feature_map", torch.randn(width, random_dimensions, generator=generator))
            self.register_buffer("probability_map", torch.randn(classes, random_dimensions, generator=generator))

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Map features ``(B, d)`` and logits ``(B, C)`` to ``(B, dimensions)``."""
        probabilities = in_full_precision(torch.softmax)(logits, 1)
        if self.random:
            return random_product(features, probabilities, self.feature_map, self.probability_map)
        return outer_product(features, probabilities)
