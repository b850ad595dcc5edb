"""Random inputs of losses."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.features import Outputs

Array = np.ndarray[Any, np.dtype[np.float64]]


def random_outputs(
    rows: int,
    *,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
    requires_grad: bool = False,
    **shapes: tuple[int, ...],
) -> Outputs:
    """Return normally distributed logits, and features of these shapes (without the batch) by layer."""

    def leaf(*shape: int) -> Tensor:
        return (factor * torch.randn(rows, *shape)).to(dtype).requires_grad_(requires_grad)

    return Outputs(leaf(classes), {name: leaf(*shape) for name, shape in shapes.items()})


def random_logits(rows: int, classes: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return a student's and a teacher's float64 logits."""
    student, teacher = spread * torch.randn(2, rows, classes, dtype=torch.float64)
    return student, teacher


def random_labels(rows: int, classes: int) -> Tensor:
    """Return class indices, of which the second is -1 (unlabelled) where there are more than two rows."""
    labels = torch.randint(classes, (rows,))
    labels[1:2] = labels[1:2] if rows < 3 else -1
    return labels


def random_maps() -> tuple[Tensor, Tensor]:
    """Return a student's and a teacher's float64 maps of one size, with different numbers of channels."""
    return torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 7, 5, 6, dtype=torch.float64)


def random_rotation(size: int) -> Tensor:
    """Return an orthogonal float64 matrix."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def autocast_if(enabled: bool) -> AbstractContextManager[object]:
    """Return bfloat16 autocast on the CPU, or a context that changes nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else nullcontext()
