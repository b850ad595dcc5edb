"""Vectors of length 1."""

import torch
from torch import Tensor


def directions(vectors: Tensor, dim: int = 1) -> Tensor:
    """Each vector divided by its length; 0, without gradient, where the length is 0 and there is no direction.

    Args:
        vectors: Any shape.
        dim: Along which the vectors lie.

    Example:
        >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    lengths = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    none = lengths == 0
    return torch.where(none, 0.0, vectors / torch.where(none, 1.0, lengths))
