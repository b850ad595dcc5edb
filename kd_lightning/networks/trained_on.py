"""What a network's weights expect of their input, carried by the network itself."""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from torch import nn


class TrainedOn(NamedTuple):
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
    ) -> "TrainedOn":
        """Check and convert.

        Raises:
            ValueError: If only one of the statistics is given, they differ in length or a deviation is not above 0.
        """
        if (mean is None) != (std is None):
            raise ValueError("mean and std describe the input together; give both or neither.")
        if mean is not None and std is not None and not _possible(mean, std):
            raise ValueError(
                f"mean and std need one value for each channel and deviations above 0, got {mean} and {std}."
            )
        return cls(_floats(mean), _floats(std), None if classes is None else tuple(map(str, classes)))


def _possible(mean: Sequence[float], std: Sequence[float]) -> bool:
    return 0 < len(mean) == len(std) and all(map(isfinite, [*mean, *std])) and min(std) > 0


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))


def refuse_other_classes(who: str, known: TrainedOn, data: TrainedOn) -> None:
    """Make sure that a network and its data, where both are known, name the same classes in the same order.

    Args:
        who: Names the network in the message.
        known: What the network was trained on.
        data: What it is about to see.

    Raises:
        ValueError: If they differ.
    """
    if known.classes and data.classes and known.classes != data.classes:
        raise ValueError(
            f"{who} was trained on the classes {shortened(known.classes)} and the data have "
            f"{shortened(data.classes)}; the order and the names must be the same."
        )


def shortened(names: Sequence[str]) -> str:
    """The first five names, and how many there are besides.

    Example:
        >>> shortened("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def trained_on(network: nn.Module) -> TrainedOn:
    """What :func:`from_checkpoint` learned about a network's data; nothing for any other network."""
    return getattr(network, "trained_on", TrainedOn())
