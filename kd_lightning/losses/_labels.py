"""Class indices, and class probabilities in their place."""

import torch
from torch import Tensor


def class_indices(labels: Tensor) -> Tensor:
    """Return class indices ``(B,)``, -1 where unlabelled: the labels themselves, or the most probable classes.

    Args:
        labels: Class indices ``(B,)``, or class probabilities ``(B, C)``, with rows of -1 where unlabelled.

    Example:
        >>> class_indices(torch.tensor([[0.2, 0.8], [-1.0, -1.0]]))
        tensor([ 1, -1])
    """
    if not labels.is_floating_point():
        return labels
    highest, classes = labels.max(1)
    return torch.where(highest >= 0, classes, -1)
