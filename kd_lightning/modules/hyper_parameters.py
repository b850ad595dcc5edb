"""What a checkpoint says about how its module was built: plain data, and only classes that are known."""

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

_TRUSTED = ("kd_lightning", "torch", "torchvision")


def unsaved(*objects: str) -> list[str]:
    """The arguments that ``save_hyperparameters`` leaves out: objects, unless the command line's plain text stands in.

    Lightning would pickle them into the checkpoint.

    Args:
        objects: The names of arguments that are networks, losses or functions.
    """
    return list(objects) if _given_hyperparameters.get() is None else []


def refuse_foreign_classes(hyper_parameters: Any, path: str) -> None:
    """Make sure that rebuilding a module from a checkpoint imports nothing that the file chooses.

    Args:
        hyper_parameters: What the checkpoint holds.
        path: Of the checkpoint, for the message.

    Raises:
        ValueError: If it names a class outside kd_lightning, torch, torchvision and the modules already imported.
    """
    for name in _class_paths(hyper_parameters):
        if name == "lightning.pytorch.cli.instantiate_module":  # how Lightning rebuilds a module of its command line
            continue
        package = name.partition(".")[0]
        home = name.rpartition(".")[0]
        if package not in _TRUSTED and home not in sys.modules:
            raise ValueError(
                f"{path!r} asks for the class {name!r}, which is not part of kd_lightning, torch or torchvision; "
                f"import {home or name!r} yourself first if you trust it."
            )


def unfilled(config: Any) -> Any:
    """The configuration of a network without the files that would fill it."""
    if not isinstance(config, dict):
        return config
    if str(config.get("class_path")).endswith("from_checkpoint"):
        return unfilled(config["init_args"]["network"])
    return {key: unfilled(value) for key, value in config.items()}


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("class_path", "_class_path", "_instantiator") and isinstance(item, str):
                yield item
            else:
                yield from _class_paths(item)
    elif isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value):
        if find_spec(value.partition(".")[0]):  # a plain string may name a class as well
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _class_paths(item)
