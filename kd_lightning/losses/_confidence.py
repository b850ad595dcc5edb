"""The masks of SKD's and MLLD's released code: the less confident half of a batch, or of the classes."""

from torch import Tensor


def less_confident(confidences: Tensor) -> Tensor:
    """Return which values are at or below the median, as 1 and 0.

    Args:
        confidences: ``(n,)``.

    Example:
        >>> import torch
        >>> less_confident(torch.tensor([0.9, 0.2, 0.5]))
        tensor([0., 1., 1.])
    """
    ordered = confidences.sort().values
    return (confidences <= ordered[(len(ordered) - 1) // 2]).to(confidences.dtype)


def masked_share(count: int) -> float:
    """Return the fraction of the values that are at or below their median, if no two are equal.

    Example:
        >>> masked_share(4), masked_share(3)
        (0.5, 0.6666666666666666)
    """
    return (count + 1) // 2 / count
