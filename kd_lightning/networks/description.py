"""The description of a network in a checkpoint, as plain data beside its weights."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kd_lightning.files.format import FORMAT, KEY
from kd_lightning.networks.channel_slicing import slice_to, sliced_shapes
from kd_lightning.networks.data_config import DataConfig, data_config, set_data_config


def describe_network(network: nn.Module) -> dict[str, object]:
    """Return what a network needs to be used elsewhere: its input and classes, and its widths if it was pruned.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> set_data_config(network, DataConfig.of(classes=["cat", "dog"]))
        >>> describe_network(network)["data_config"]["classes"]
        ('cat', 'dog')
    """
    shapes = sliced_shapes(network)
    widths: dict[str, object] = {} if shapes is None else {"sliced_shapes": shapes}
    return {KEY: FORMAT, "data_config": data_config(network).as_plain(), **widths}


def apply_description(network: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a network the widths, input and classes that a checkpoint describes, in place.

    Args:
        network: Network with the widths from before pruning.
        checkpoint: Content of a checkpoint, which :func:`describe_network` is part of.

    Raises:
        UserError: If the network is another one than was pruned, or the description is damaged.
    """
    if isinstance(checkpoint.get("sliced_shapes"), dict):
        slice_to(network, checkpoint["sliced_shapes"])
    set_data_config(network, DataConfig.of(**checkpoint.get("data_config", {})))
