"""Rows without their mean, and which of them vary."""

import torch
from torch import Tensor


def centred(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row minus its mean, the length of the difference, and whether the row is constant up to rounding.

    Where it is constant the length is given as 1, so that a division by it has a finite gradient.

    Args:
        rows: ``(B, n)``.

    Returns:
        ``(B, n)``, ``(B, 1)`` and boolean ``(B, 1)``.

    Example:
        >>> centred(torch.tensor([[1.0, 7.0], [0.1, 0.1]]))
        (tensor([[-3.,  3.],
                [ 0.,  0.]]), tensor([[4.2426],
                [1.0000]]), tensor([[False],
                [ True]]))
    """
    difference = rows - rows.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
    rounding = 8 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    constant = lengths <= rounding
    return difference, torch.where(constant, 1.0, lengths), constant
