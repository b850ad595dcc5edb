"""The memory format in which a network runs."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

_BLOCK = 16
"""Channels that oneDNN treats at once with AVX-512, and 8 with AVX2."""


def overruns_channels_last(network: nn.Module) -> bool:
    """Return whether oneDNN, with which torch trains on CPUs, would write past its memory for maps in channels-last.

    It does for the gradient of the weights of strided 1x1 convolutions of few channels, and processes crash from images
    of about 56 pixels on. See https://github.com/uxlfoundation/oneDNN/issues/6035.

    Example:
        >>> [overruns_channels_last(nn.Conv2d(width, 32, 1, stride=2)) for width in (8, 16)]
        [True, False]
    """
    return any(
        isinstance(layer, nn.Conv2d)
        and set(layer.kernel_size) == {1}
        and max(layer.stride) > 1
        and layer.in_channels < _BLOCK
        for layer in network.modules()
    )


def use_channels_last(network: nn.Module, forward: Callable[[], object], *, trains_on_cpu: bool = False) -> bool:
    """Convert a network to channels-last, in which convolutions are fastest, unless it cannot run in it.

    A network that calls ``view`` on its maps, as in many tutorials, needs contiguous ones; ``reshape`` or ``flatten``
    would take both.

    Args:
        network: The network, which is converted in place; it stays or becomes contiguous where the trial fails.
        forward: Function that runs it, without gradient and in eval mode.
        trains_on_cpu: Whether it is trained on a CPU, where some networks must not be in channels-last; see
            :func:`overruns_channels_last`.

    Returns:
        Whether the network is in channels-last.

    Example:
        >>> network, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), torch.rand(2, 3, 4, 4)
        >>> use_channels_last(network, lambda: network(images))
        True
    """
    if not (trains_on_cpu and overruns_channels_last(network)):
        network.to(memory_format=torch.channels_last)
        with suppress(RuntimeError):  # where the format is not the reason, the caller's own trial raises it again
            forward()
            return True
    use_contiguous(network)
    return False


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
