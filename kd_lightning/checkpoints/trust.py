"""Restricts which classes the hyper-parameters of a checkpoint can import."""

import functools
import inspect
import pkgutil
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import get_type_hints

from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings  # only to reset and restore them, for which there is no public way
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.errors import UserError, first_line

_TRUSTED = ("kd_lightning", "torch", "torchvision")
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""Function with which Lightning rebuilds a module of its command line."""
ALLOWED_TYPES = (nn.Module, Optimizer, LRScheduler)


def unserializable(*objects: str) -> list[str]:
    """Return the arguments that ``save_hyperparameters`` must leave out, since Lightning would pickle them.

    Under the command line there are none: their plain text is saved instead.

    Args:
        objects: Names of arguments that are networks, losses or functions.
    """
    return list(objects) if _given_hyperparameters.get() is None else []


def check_trusted_classes(
    hyper_parameters: object, path: str, *, trusted: Collection[str] = (), strings: bool = True
) -> None:
    """Make sure that rebuilding a module imports no module that only the checkpoint names.

    Args:
        hyper_parameters: Hyper-parameters of the checkpoint.
        path: Path of the checkpoint, for the message.
        trusted: Import paths that it may name as well.
        strings: As in :func:`class_paths`.

    Raises:
        UserError: If they name a class outside kd_lightning, torch, torchvision and the modules already imported.
    """
    for name in class_paths(hyper_parameters, strings=strings):
        module = name.rpartition(".")[0]
        if is_foreign(name) and name not in trusted and module not in sys.modules:
            raise UserError(
                f"{path!r} names the class {name!r}, which is not part of kd_lightning, torch or torchvision; if you "
                f"trust it, name its run (test -c RUN, export RUN) or add --trust, or in Python import "
                f"{module or name!r} first."
            )


def is_foreign(class_path: str) -> bool:
    """Return whether an import path is outside the packages whose classes every checkpoint may name.

    Example:
        >>> is_foreign("timm.create_model"), is_foreign("torch.nn.Linear")
        (True, False)
    """
    return class_path != _INSTANTIATOR and class_path.partition(".")[0] not in _TRUSTED


def imported_packages(paths: Iterable[str]) -> list[str]:
    """Return which packages of import paths were imported, without those whose classes every checkpoint may name.

    Example:
        >>> imported_packages(["torch.nn.Linear", "argparse.ArgumentParser", "argparse.Action"])
        ['argparse']
    """
    return sorted({name.partition(".")[0] for name in paths if is_foreign(name)} & set(sys.modules))


def referenced_classes(
    hyper_parameters: object,
    path: str,
    *,
    trusted: Collection[str] = (),
    types: tuple[type, ...] = ALLOWED_TYPES,
    strings: bool = True,
) -> set[str]:
    """Return all import paths of the classes and functions in hyper-parameters.

    Call :func:`check_trusted_classes` first: this function imports them.

    Args:
        hyper_parameters: Hyper-parameters of the checkpoint.
        path: Path of the checkpoint, for the message.
        trusted: Import paths of classes and functions that may create anything.
        types: Classes whose objects all others may create.
        strings: As in :func:`class_paths`.

    Raises:
        UserError: If one of them creates anything but a network, loss, optimizer or scheduler: torch also has classes
            that start a process when they are created.
    """
    paths: set[str] = set()
    for name in class_paths(hyper_parameters, strings=strings):
        named = resolve(name)
        if name == _INSTANTIATOR or not callable(named):
            continue
        if name not in trusted and not _is_allowed_type(named, types):
            raise UserError(
                f"{path!r} names {name!r}, which is not a network, loss, optimizer or scheduler; pass the argument "
                "that needs it to load_from_checkpoint yourself if you trust the file."
            )
        paths |= {name, *import_paths(named)}
    return paths


def resolve(name: object) -> object:
    """Return the object at an import path, or ``None`` if there is none.

    Example:
        >>> resolve("torch.nn.Linear"), resolve("torch.nothing")
        (<class 'torch.nn.modules.linear.Linear'>, None)
    """
    module, _, attribute = str(name).rpartition(".")
    for path in (f"{module}:{attribute}", str(name)):  # the first prefers a function to a module of the same name
        with suppress(ImportError, AttributeError, ValueError):
            return pkgutil.resolve_name(path)
    return None


@contextmanager
def restricted_imports(path: str, allowed: set[str]) -> Iterator[None]:
    """Let jsonargparse import only some classes while a module is rebuilt, however a checkpoint spells their names.

    A string may contain a whole configuration, for example.

    Args:
        path: Path of the checkpoint, for the message.
        allowed: Import paths that may be used.

    Raises:
        UserError: If the module cannot be rebuilt with them.
    """
    before = dict(parsing_settings)
    parsing_settings["import_path_verdicts"] = {}  # what a user allows in general is not allowed to a file
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(allowed))
        yield
    except ArgumentError as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"{path!r} does not describe a module that can be rebuilt ({reason}); pass that argument to "
            "load_from_checkpoint yourself."
        ) from error
    finally:
        parsing_settings.update(before)


def is_from_checkpoint(class_path: object) -> bool:
    """Return whether a configuration's ``class_path`` is :func:`kd_lightning.networks.from_checkpoint`.

    Example:
        >>> is_from_checkpoint("kd_lightning.networks.from_checkpoint")
        True
    """
    return str(class_path).endswith("from_checkpoint")


def strip_pretrained(config: object) -> object:
    """Return the configuration of a network without the files that its weights would be loaded from.

    Example:
        >>> strip_pretrained({"class_path": "torchvision.models.resnet18", "init_args": {"weights": "DEFAULT"}})
        {'class_path': 'torchvision.models.resnet18', 'init_args': {'weights': None}}
    """
    if not isinstance(config, dict):
        return config
    if is_from_checkpoint(config.get("class_path")):
        return strip_pretrained(config["init_args"]["network"])
    stripped = {key: strip_pretrained(value) for key, value in config.items()}
    offline = without_download(str(config.get("class_path")), config.get("init_args") or {})
    for arguments in (stripped.get("init_args"), stripped.get("dict_kwargs")):
        if isinstance(arguments, dict):
            arguments.update({name: value for name, value in offline.items() if name in arguments})
    return stripped


def without_download(class_path: str, arguments: dict[str, object]) -> dict[str, object]:
    """Return the arguments with which a function of torchvision or timm downloads nothing.

    Args:
        class_path: Import path of a function or class.
        arguments: Its arguments.

    Example:
        >>> without_download("torchvision.models.resnet18", {}), without_download("my_nets.Net", {})
        ({'weights': None}, {})
    """
    module, _, function = class_path.rpartition(".")
    network = arguments.get("name") if function == "get_model" else function
    if module.startswith("torchvision.models") and network not in ("googlenet", "inception_v3"):
        return {"weights": None}  # the other two are built otherwise with weights
    return {"pretrained": False} if module.partition(".")[0] == "timm" and function == "create_model" else {}


def _is_allowed_type(named: Callable[..., object], types: tuple[type, ...]) -> bool:
    created: object = named
    if not inspect.isclass(named):
        created = None
        with suppress(NameError, TypeError, AttributeError):  # an annotation that cannot be resolved
            created = get_type_hints(named).get("return")
    return inspect.isclass(created) and issubclass(created, types)


def import_paths(named: object) -> set[str]:
    """Return the paths at which jsonargparse may look an object up: its definition, and every re-export above it."""
    if isinstance(named, functools.partial):
        return import_paths(named.func)
    if not hasattr(named, "__qualname__"):  # a callable object
        return import_paths(type(named))
    parts = named.__module__.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    exporting = [module for module in above if getattr(sys.modules.get(module), named.__qualname__, None) is named]
    return {f"{module}.{named.__qualname__}" for module in [*exporting, named.__module__]}


def class_paths(value: object, *, strings: bool = True) -> Iterator[str]:
    """Yield the import paths in nested plain data.

    Args:
        value: Hyper-parameters, or a part of them.
        strings: Yield plain strings that could name a class as well.

    Example:
        >>> list(class_paths({"network": {"class_path": "my_nets.Net", "init_args": {"act": "torch.nn.ReLU"}}}))
        ['my_nets.Net', 'torch.nn.ReLU']
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("class_path", "_class_path", "_instantiator") and isinstance(item, str):
                yield item
            elif key != "path":  # the name of a file, such as "test.pt", can equal the name of a class
                yield from class_paths(item, strings=strings)
    elif isinstance(value, str) and strings and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value):
        package = value.partition(".")[0]
        if package in sys.modules or find_spec(package):
            yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from class_paths(item, strings=strings)


def import_classes(configuration: object, path: str) -> set[str]:
    """Import the classes and functions that a configuration names, and return their import paths.

    Args:
        configuration: Nested plain data that the user trusts.
        path: Path of its file, for the message.

    Raises:
        UserError: If one of them does not exist.
    """
    for name in class_paths(configuration, strings=False):
        module, _, attribute = name.rpartition(".")
        if not is_foreign(name):
            continue
        try:
            pkgutil.resolve_name(f"{module}:{attribute}")
        except ModuleNotFoundError as error:
            raise UserError(
                f"{path!r} names {name!r}, and there is no module {error.name!r}; install it, or run the command in "
                "the folder that contains it."
            ) from error
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{path!r} names {name!r}, which cannot be imported ({first_line(error)}).") from error
    return set(class_paths(configuration))
