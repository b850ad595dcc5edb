"""Copies of networks."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copy_network(network: Network) -> Network:
    """Return a deep copy of a network, also of one that keeps intermediate tensors as attributes.

    ``copy.deepcopy`` rejects tensors with a gradient history, which torch's old ``weight_norm`` and ``spectral_norm``
    leave in a layer after a forward pass; they are computed again in the next one.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.remembered = layer.weight * 2
        >>> copy_network(layer).remembered.requires_grad
        False
    """
    kept = [
        (module, name, value)
        for module in network.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for module, name, value in kept:
        vars(module)[name] = value.detach()
    try:
        with torch.no_grad():  # TorchScript clones its weights
            return copy.deepcopy(network)
    finally:
        for module, name, value in kept:
            vars(module)[name] = value
