"""What a network's weights expect of their input, carried by the network itself."""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from torch import nn

from kd_lightning.errors import UserError


class DataConfig(NamedTuple):
    """The data that a network's weights were trained on; ``None`` where it is not known.

    Attributes:
        mean: Mean of each channel that was subtracted from images in [0, 1].
        std: Standard deviation of each channel that they were divided by.
        classes: Class names in the order of the logits.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
    ) -> "DataConfig":
        """Check and convert.

        Raises:
            ValueError: If only one of the statistics is given, they differ in length or a deviation is not above 0.
        """
        if (mean is None) != (std is None):
            raise UserError("mean and std describe the input together; give both or neither.")
        if mean is not None and std is not None and not _possible(mean, std):
            raise UserError(
                f"mean and std need one value for each channel and deviations above 0, got {mean} and {std}."
            )
        return cls(_floats(mean), _floats(std), None if classes is None else tuple(map(str, classes)))


def _possible(mean: Sequence[float], std: Sequence[float]) -> bool:
    return 0 < len(mean) == len(std) and all(map(isfinite, [*mean, *std])) and min(std) > 0


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))


def check_same_classes(who: str, known: DataConfig, data: DataConfig) -> None:
    """Make sure that a network and its data, where both are known, name the same classes in the same order.

    Args:
        who: Names the network in the message.
        known: What the network was trained on.
        data: What it is about to see.

    Raises:
        ValueError: If they differ.
    """
    if known.classes and data.classes and known.classes != data.classes:
        raise UserError(
            f"{who} was trained on the classes {truncate(known.classes)} and the data have "
            f"{truncate(data.classes)}; the order and the names must be the same."
        )


def truncate(names: Sequence[str]) -> str:
    """The first five names, and how many there are besides.

    Example:
        >>> truncate("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def data_config(network: nn.Module) -> DataConfig:
    """What :func:`from_checkpoint` learned about a network's data; nothing for any other network."""
    return getattr(network, "data_config", DataConfig())
