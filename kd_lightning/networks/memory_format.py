"""The memory format in which a network runs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def use_channels_last(network: nn.Module, forward: Callable[[], object]) -> bool:
    """Convert a network to channels-last, in which convolutions are fastest, unless it cannot run in it.

    A network that calls ``view`` on its maps, as in many tutorials, needs contiguous ones; ``reshape`` or ``flatten``
    would take both.

    Args:
        network: The network, which is converted in place; it stays or becomes contiguous where the trial fails.
        forward: Function that runs it, without gradient and in eval mode.

    Returns:
        Whether the network is in channels-last.

    Example:
        >>> network, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), torch.rand(2, 3, 4, 4)
        >>> use_channels_last(network, lambda: network(images))
        True
    """
    network.to(memory_format=torch.channels_last)
    try:
        forward()
    except RuntimeError:  # where this is not the reason, the caller's own trial raises it again
        use_contiguous(network)
        return False
    return True


def use_contiguous(network: nn.Module) -> None:
    """Convert a network, in place, to the memory format of a new one.

    Example:
        >>> network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        >>> use_contiguous(network)
        >>> network.weight.is_contiguous()
        True
    """
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = contiguous(tensor.data)


def contiguous(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor with the strides of a new one.

    With one channel, or one pixel, ``tensor.contiguous()`` keeps the strides of channels-last, and convolutions then
    return maps in that format.

    Example:
        >>> grey = torch.rand(2, 1, 4, 4).to(memory_format=torch.channels_last)
        >>> grey.contiguous().stride(), contiguous(grey).stride()
        ((16, 1, 4, 1), (16, 16, 4, 1))
    """
    return tensor.flatten().view(tensor.shape)
