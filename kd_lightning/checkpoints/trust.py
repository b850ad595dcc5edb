"""What a checkpoint says about how its module was built: plain data, and only classes that are known."""

import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, get_type_hints

from jsonargparse._common import parsing_settings
from jsonargparse._util import canonical_import_paths, get_import_path, import_object
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.errors import UserError

_TRUSTED = ("kd_lightning", "torch", "torchvision")
_REBUILDS = "lightning.pytorch.cli.instantiate_module"
"""How Lightning rebuilds a module of its command line."""
_PARTS = (nn.Module, Optimizer, LRScheduler)


def unserializable(*objects: str) -> list[str]:
    """The arguments that ``save_hyperparameters`` leaves out: objects, unless the command line's plain text stands in.

    Lightning would pickle them into the checkpoint.

    Args:
        objects: The names of arguments that are networks, losses or functions.
    """
    return list(objects) if _given_hyperparameters.get() is None else []


def check_trusted_classes(hyper_parameters: Any, path: str) -> None:
    """Make sure that rebuilding a module from a checkpoint imports nothing that the file chooses.

    Args:
        hyper_parameters: What the checkpoint holds.
        path: Of the checkpoint, for the message.

    Raises:
        ValueError: If it names a class outside kd_lightning, torch, torchvision and the modules already imported.
    """
    for name in _class_paths(hyper_parameters):
        if name == _REBUILDS:
            continue
        package = name.partition(".")[0]
        home = name.rpartition(".")[0]
        if package not in _TRUSTED and home not in sys.modules:
            raise UserError(
                f"{path!r} asks for the class {name!r}, which is not part of kd_lightning, torch or torchvision; "
                f"import {home or name!r} yourself first if you trust it."
            )


def referenced_classes(hyper_parameters: Any, path: str) -> set[str]:
    """The import paths of what a checkpoint has made, once :func:`check_trusted_classes` has passed it.

    Raises:
        ValueError: If that is anything but networks, losses, optimizers and schedules: torch also has classes that
            start a process when they are made.
    """
    paths = set()
    for name in _class_paths(hyper_parameters):
        named = None
        with suppress(ImportError, AttributeError, ValueError):  # then it is plain text
            named = import_object(name, check_path=False)
        if name == _REBUILDS or not callable(named):
            continue
        if not _is_allowed_type(named):
            raise UserError(
                f"{path!r} asks for {name!r}, which is no network, loss, optimizer or schedule; pass the argument that "
                "needs it to load_from_checkpoint yourself if you trust the file."
            )
        paths |= {name, get_import_path(named), *canonical_import_paths(named)}
    return paths


@contextmanager
def restricted_imports(path: str, parts: set[str]) -> Iterator[None]:
    """While a module is rebuilt from a checkpoint, nothing else can be imported, however it is spelled there.

    A string may hold a whole configuration, for example.

    Args:
        path: Of the checkpoint, for the message.
        parts: The import paths that may be used.

    Raises:
        ValueError: If the module cannot be rebuilt so.
    """
    before = dict(parsing_settings)
    verdicts = {"*": False, **dict.fromkeys(parts, True)}
    parsing_settings.update(import_path_verdicts=verdicts, import_paths_enforced=True)
    try:
        yield
    except ArgumentError as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"{path!r} does not describe a module that can be rebuilt ({reason}); pass that argument to "
            "load_from_checkpoint yourself."
        ) from error
    finally:
        parsing_settings.update(before)


def strip_pretrained(config: Any) -> Any:
    """The configuration of a network without the files that would fill it."""
    if not isinstance(config, dict):
        return config
    if str(config.get("class_path")).endswith("from_checkpoint"):
        return strip_pretrained(config["init_args"]["network"])
    return {key: strip_pretrained(value) for key, value in config.items()}


def _is_allowed_type(named: Any) -> bool:
    made = named
    if not inspect.isclass(named):
        made = None
        with suppress(Exception):  # an annotation that cannot be resolved says nothing
            made = get_type_hints(named).get("return")
    return inspect.isclass(made) and issubclass(made, _PARTS)


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("class_path", "_class_path", "_instantiator") and isinstance(item, str):
                yield item
            elif key != "path":  # of a file: teacher.ckpt is a class of no module, nor is test.pt of Python's own
                yield from _class_paths(item)
    elif isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value):
        package = value.partition(".")[0]
        if package in sys.modules or find_spec(package):  # a plain string may name a class as well
            yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _class_paths(item)
