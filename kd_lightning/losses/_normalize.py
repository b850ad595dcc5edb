"""Vectors of length 1, and rows of mean 0 or of z-scores."""

import torch
from torch import Tensor


def normalize(vectors: Tensor, *, dim: int = 1) -> Tensor:
    """Divide each vector by its length; return 0, without gradient, where the length is 0.

    Args:
        vectors: Any shape.
        dim: Dimension along which a vector's entries are stored.

    Example:
        >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    lengths = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    none = lengths == 0
    return torch.where(none, 0.0, vectors / torch.where(none, 1.0, lengths))


def standardize_columns(rows: Tensor, *, variance_eps: float = 0.0, deviation_eps: float = 0.0) -> Tensor:
    """Return the z-scores of each column over the batch; columns that are constant up to rounding are 0.

    Those have no gradient, and the others the biased deviation: ``sqrt(variance + variance_eps) + deviation_eps``.

    Args:
        rows: ``(B, n)``.
        variance_eps: Added to the variances.
        deviation_eps: Added to the deviations.

    Example:
        >>> standardize_columns(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).round()
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    difference, lengths, constant = center(rows.T)
    deviations = (lengths.square() / len(rows) + variance_eps).sqrt() + deviation_eps
    return torch.where(constant, 0.0, difference / deviations).T


def center(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row minus its mean, the length of that, and whether the row is constant up to rounding.

    Where a row is constant its length is returned as 1, so that a division by it has a finite gradient.

    Args:
        rows: ``(B, n)``.

    Returns:
        ``(B, n)``, ``(B, 1)`` and boolean ``(B, 1)``.

    Example:
        >>> center(torch.tensor([[1.0, 7.0], [0.1, 0.1]]))
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


def z_score(logits: Tensor) -> Tensor:
    """Return each row's z-scores ``(B, n)``; constant rows have none, and no gradient towards one.

    Example:
        >>> z_score(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])).round(decimals=4)
        tensor([[-1.,  0.,  1.],
                [ 0.,  0.,  0.]])
    """
    difference, lengths, constant = center(logits)
    deviations = lengths / max(logits.shape[1] - 1, 1) ** 0.5
    return torch.where(constant, 0.0, difference / (deviations + 1e-7))
