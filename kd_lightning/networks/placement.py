"""Finds the device of a network's weights."""

from itertools import chain

import torch
from torch import nn


def weight_device(network: nn.Module) -> torch.device:
    """Return the device of a network's weights or buffers; the CPU if it has none.

    ``LightningModule.device`` is another thing: while Lightning calls ``setup`` and loads a checkpoint it already names
    the Trainer's device, and the weights are moved there afterwards.

    Example:
        >>> weight_device(nn.Linear(2, 3))
        device(type='cpu')
    """
    held = next(chain(network.parameters(), network.buffers()), None)
    return torch.device("cpu") if held is None else held.device
