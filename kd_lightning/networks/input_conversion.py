"""The form in which a network takes the images of a data module."""

from collections.abc import Callable

from torch import Tensor, nn

from kd_lightning.networks.data_config import DataConfig, data_config
from kd_lightning.networks.memory_format import contiguous, use_channels_last
from kd_lightning.networks.normalization import normalization_between
from kd_lightning.networks.placement import weight_device


class InputConversion(nn.Module):
    """Converts images of a data module to the statistics and the memory format of a network.

    Attributes:
        statistics: Converts the statistics, after :meth:`match`.
        channels_last: Whether the network runs in channels-last, after :meth:`choose_memory_format`.

    Example:
        >>> import torch
        >>> network = nn.Conv2d(1, 2, 1)
        >>> convert_input = InputConversion()
        >>> convert_input.match(network, DataConfig.of(mean=[0.5], std=[0.5]))
        >>> convert_input.choose_memory_format(network, lambda: network(convert_input(torch.rand(4, 1, 8, 8))))
        >>> convert_input.channels_last
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.statistics: nn.Module = nn.Identity()
        self.channels_last = False

    def forward(self, images: Tensor) -> Tensor:
        """Return converted images ``(B, channels, H, W)``."""
        converted: Tensor = self.statistics(images)
        return self.in_memory_format(converted)

    def in_memory_format(self, images: Tensor) -> Tensor:
        """Return images in the memory format of the network, with their statistics as they are."""
        return images if self.channels_last else contiguous(images)

    def match(self, network: nn.Module, data: DataConfig) -> None:
        """Convert from the statistics of the data to those that the network was trained with.

        Raises:
            UserError: If both are known and the numbers of channels differ.
        """
        self.statistics = normalization_between(data, data_config(network)).to(weight_device(network))

    def choose_memory_format(
        self, network: nn.Module, forward: Callable[[], object], *, trains_on_cpu: bool = False
    ) -> None:
        """Convert a network to channels-last where it can run in it; see :func:`use_channels_last`."""
        self.channels_last = use_channels_last(network, forward, trains_on_cpu=trains_on_cpu)
