"""Constants that a step needs on its device, copied there once per process.

``torch.tensor(values, device=...)`` in a step copies from the host, and the host waits for a GPU to finish.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def constant(values: tuple[float, ...], *, device: torch.device) -> Tensor:
    """Return values as a float32 vector on a device.

    Example:
        >>> constant((0.5, 2.0), device=torch.device("cpu"))
        tensor([0.5000, 2.0000])
    """
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def per_channel(values: tuple[float, ...], *, device: torch.device) -> Tensor:
    """Return a value for each channel, float32 ``(channels, 1, 1)`` on a device."""
    # not a view of a vector: a tensor made in inference mode cannot be viewed in training on every device
    return torch.tensor([[[value]] for value in values], dtype=torch.float32, device=device)
