"""Buffers that a network changes even in eval mode."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class UnmovedBuffers:
    """Restores the buffers that a forward pass in eval mode changes: counters of calls, for example.

    Args:
        network: Network in eval mode.
        forward: Function that runs it once, to find these buffers; they are restored afterwards.

    Example:
        >>> network = nn.BatchNorm1d(2, momentum=None).train()
        >>> unmoved = UnmovedBuffers(network, lambda: network(torch.rand(3, 2)))
        >>> len(unmoved), network.num_batches_tracked.item()
        (3, 0)
    """

    def __init__(self, network: nn.Module, forward: Callable[[], object]) -> None:
        before = [
            (module, name, buffer.clone())
            for module in network.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        forward()
        self._saved = [
            (module, name, value) for module, name, value in before if not torch.equal(value, getattr(module, name))
        ]
        self.restore()

    def __len__(self) -> int:
        """Return the number of such buffers."""
        return len(self._saved)

    def restore(self) -> None:
        """Give the buffers their values from before."""
        for module, name, value in self._saved:
            setattr(module, name, value.clone())

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function that moves or casts tensors, as ``nn.Module._apply`` does with the network's own."""
        self._saved = [(module, name, function(value)) for module, name, value in self._saved]
