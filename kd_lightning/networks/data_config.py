"""The input that a network's weights expect: statistics, size and crop; and the classes of its logits."""

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from torch import nn

from kd_lightning.errors import UserError
from kd_lightning.files.prepare import Preparation

_ATTRIBUTE = "data_config"


DEFAULT_THRESHOLD = 0.5
"""The threshold of a class for which none was chosen, where an image may have several."""


class DataConfig(NamedTuple):
    """The data that a network's weights were trained on; ``None`` where unknown.

    Attributes:
        mean: Mean of each channel that was subtracted from images in [0, 1].
        std: Standard deviation of each channel that they were divided by.
        classes: Class names in the order of the logits.
        preparation: Resizing and crop of an image before the network is evaluated on it.
        train_size: Height and width of the images that it was trained on, where they differ from those of the
            preparation.
        thresholds: Probability (sigmoid) of each class above which an image is given it, where it may have several
            classes; ``None`` where an image has one class (softmax).

    Example:
        >>> config = DataConfig.of(mean=[0.5], std=[0.25], classes=["cat", "dog"])
        >>> config.classes, config.train_size
        (('cat', 'dog'), None)
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    preparation: Preparation | None = None
    train_size: tuple[int, int] | None = None
    thresholds: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        preparation: Preparation | Mapping[str, Any] | None = None,
        train_size: Sequence[int] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> "DataConfig":
        """Return a checked configuration.

        Args:
            mean: Mean of each channel.
            std: Standard deviation of each channel.
            classes: Class names.
            preparation: The preparation, or the plain data of one.
            train_size: Height and width in training.
            thresholds: Probability of each class above which an image is given it.

        Raises:
            UserError: If only one of the statistics is given, they differ in length, a deviation is not above 0,
                ``train_size`` is no size, or thresholds are not one probability for each class.
        """
        if (mean is None) != (std is None):
            raise UserError("mean and std describe the input together; give both or neither.")
        if mean is not None and std is not None and not _is_valid(mean, std):
            raise UserError(
                f"mean and std need one value for each channel and deviations above 0, got {mean} and {std}."
            )
        if preparation is not None and not isinstance(preparation, Preparation):
            preparation = Preparation.of(**preparation)
        if thresholds is not None and not _are_thresholds(thresholds, classes):
            raise UserError(f"thresholds need one probability in [0, 1] for each class, got {thresholds}.")
        names = None if classes is None else tuple(map(str, classes))
        size = None if train_size is None else Preparation.of(tuple(train_size)).size  # type: ignore[arg-type]
        return cls(_floats(mean), _floats(std), names, preparation, size, _floats(thresholds))

    def as_plain(self) -> dict[str, Any]:
        """Return plain data for a checkpoint, from which :meth:`of` makes the configuration again."""
        plain = None if self.preparation is None else self.preparation._asdict()
        return {**self._asdict(), "preparation": plain}


def _is_valid(mean: Sequence[float], std: Sequence[float]) -> bool:
    return 0 < len(mean) == len(std) and all(map(isfinite, [*mean, *std])) and min(std) > 0


def thresholds_or_default(thresholds: Sequence[float] | None, count: int) -> Sequence[float]:
    """Return thresholds, or the default one for each of ``count`` classes where none were chosen.

    Example:
        >>> thresholds_or_default(None, 2), thresholds_or_default([0.3, 0.6], 2)
        ((0.5, 0.5), [0.3, 0.6])
    """
    return (DEFAULT_THRESHOLD,) * count if thresholds is None else thresholds


def _are_thresholds(values: Sequence[float], classes: Sequence[str] | None) -> bool:
    return bool(values) and len(classes or values) == len(values) and all(0 <= value <= 1 for value in values)


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))


def check_same_classes(who: str, known: DataConfig, data: DataConfig) -> None:
    """Make sure that a network and its data, where both are known, name the same classes in the same order.

    Args:
        who: Name of the network in the message.
        known: Data that the network was trained on.
        data: Data that it is used on.

    Raises:
        UserError: If they differ.
    """
    if data.classes and all(re.fullmatch(r"n\d{8}", name) for name in data.classes):
        return  # ImageNet's folders, in the order of the classes that published networks name in words
    if known.classes and data.classes and known.classes != data.classes:
        advice = "the order and the names must be the same"
        if len(known.classes) != len(data.classes):
            advice = "give it a head for these with replace_head, and train it"
        raise UserError(
            f"{who} was trained on the classes {truncate(known.classes)} and the data have "
            f"{truncate(data.classes)}; {advice}."
        )


def check_same_kind(who: str, known: DataConfig, *, multi_label: bool) -> None:
    """Make sure that a network was trained on images of one class where the data have one, or else on several.

    Args:
        who: Name of the network in the message.
        known: Data that the network was trained on.
        multi_label: Whether an image of the data may have several classes.

    Raises:
        UserError: If they differ.
    """
    if (known.classes or known.thresholds) and (known.thresholds is not None) != multi_label:
        kinds = ("one class", "several classes") if multi_label else ("several classes", "one class")
        declare = "" if multi_label else ", or let the data declare multi_label"
        raise UserError(
            f"{who} was trained on images of {kinds[0]}, and the data have {kinds[1]} an image; train it on these data"
            f"{declare}."
        )


def truncate(names: Sequence[str]) -> str:
    """Return the first five names, and the number of further ones.

    Example:
        >>> truncate("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def train_on(network: nn.Module, data: DataConfig) -> None:
    """Attach classes and sizes of the data that a network is trained on, and their statistics if it has none.

    Where images have several classes, thresholds that were chosen for the same ones stay until others are.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> train_on(network, DataConfig.of(mean=[0.5], std=[0.2], classes=["cat", "dog"]))
        >>> train_on(network, DataConfig.of(mean=[0.4], std=[0.1]))
        >>> data_config(network)
        DataConfig(mean=(0.5,), std=(0.2,), classes=('cat', 'dog'), preparation=None, train_size=None, thresholds=None)
    """
    known = data_config(network)
    statistics = data if known.mean is None else known
    sizes = known if data.preparation is None else data
    thresholds = data.thresholds
    if thresholds is not None and known.thresholds is not None and known.classes == data.classes:
        thresholds = known.thresholds
    trained = statistics._replace(classes=data.classes or known.classes, thresholds=thresholds)
    set_data_config(network, trained._replace(preparation=sizes.preparation, train_size=sizes.train_size))


def data_config(network: nn.Module | None) -> DataConfig:
    """Return what is known of a network's input, with ``None`` in all fields if nothing is.

    That is the configuration that is attached to it, or that of a trained network of timm.

    Example:
        >>> data_config(nn.Linear(2, 3)) == DataConfig()
        True
    """
    known: DataConfig = getattr(network, _ATTRIBUTE, DataConfig())
    if network is not None and known.mean is None and known.preparation is None:
        from kd_lightning.networks.published_config import timm_config  # which makes configurations

        published = timm_config(network)
        return published._replace(classes=known.classes or published.classes, thresholds=known.thresholds)
    return known


def set_data_config(network: nn.Module, config: DataConfig) -> None:
    """Attach a configuration to a network.

    It is the plain attribute ``network.data_config``, so that copies keep it and the state dict does not contain it.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> set_data_config(network, DataConfig.of(classes=["cat", "dog"]))
        >>> data_config(network).classes
        ('cat', 'dog')
    """
    setattr(network, _ATTRIBUTE, config)
