"""Rebuilds what a checkpoint describes beside its network, importing only what a checkpoint may name."""

from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.trust import (
    ALLOWED_TYPES,
    check_trusted_classes,
    referenced_classes,
    restricted_imports,
    strip_pretrained,
)
from kd_lightning.errors import UserError, find_cause, first_line


def rebuild_data(checkpoint: Checkpoint) -> pl.LightningDataModule | None:
    """Return the data module that a run of the command line was trained on, before ``setup``; ``None`` for others.

    Args:
        checkpoint: Checkpoint of the run.

    Raises:
        UserError: If it names classes that are not trusted, or does not describe a data module.
    """
    described = _data(checkpoint)
    if described is None:
        return None
    data = _rebuild(checkpoint, data=described)["data"]
    assert isinstance(data, pl.LightningDataModule)
    return data


def rebuild_network(checkpoint: Checkpoint, described: dict[str, Any]) -> nn.Module:
    """Return another network than the trained one, for example the teacher, of a checkpoint's run.

    Args:
        checkpoint: Checkpoint of the run, which says what may be imported.
        described: Class and arguments of the network, as in ``hyper_parameters["teacher"]``.

    Raises:
        UserError: If classes are named that are not trusted, or that cannot be built.
    """
    network = _rebuild(checkpoint, network=described)["network"]
    assert isinstance(network, nn.Module)
    return network


def saved_configuration(checkpoint: Checkpoint) -> str:
    """Return the sections ``model`` and, if known, ``data`` of the configuration of a run, as YAML.

    All weights of the network are taken to be in the checkpoint.

    Args:
        checkpoint: Checkpoint of the run.

    Raises:
        UserError: If it names classes that are not trusted, or was saved from Python.
    """
    saved = checkpoint.hyper_parameters
    if not isinstance(saved.get("_class_path"), str):
        raise UserError(
            f"{str(checkpoint.path)!r} was saved from Python, which keeps weights and no code; add -c with a recipe of "
            "its network."
        )
    model = _subclass(saved)
    for name in ("network", "student"):
        if name in model["init_args"]:
            model["init_args"][name] = strip_pretrained(model["init_args"][name])
    data = _data(checkpoint)
    parser, parsed = _parse(checkpoint, {"model": model} | ({} if data is None else {"data": data}))
    text: str = parser.dump(parsed, skip_none=False)
    return text


def _data(checkpoint: Checkpoint) -> dict[str, Any] | None:
    saved = checkpoint.content.get("datamodule_hyper_parameters")
    return _subclass(saved) if isinstance(saved, dict) and isinstance(saved.get("_class_path"), str) else None


def _subclass(saved: dict[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters in the form that a configuration has."""
    arguments = {name: value for name, value in saved.items() if name not in ("_class_path", "_instantiator")}
    return {"class_path": saved["_class_path"], "init_args": arguments}


_SECTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "model": (pl.LightningModule, ALLOWED_TYPES),
    "network": (nn.Module, ALLOWED_TYPES),
    "data": (pl.LightningDataModule, (pl.LightningDataModule,)),
}
"""Class of a section, and the classes that a checkpoint may create in it."""


def _rebuild(checkpoint: Checkpoint, **sections: dict[str, Any]) -> dict[str, object]:
    parser, parsed = _parse(checkpoint, sections)
    try:
        with restricted_imports(str(checkpoint.path), _allowed(checkpoint, sections)):
            built: dict[str, object] = vars(parser.instantiate_classes(parsed))
    except ValueError as error:  # jsonargparse wraps the errors of constructors
        cause = find_cause(error, UserError)
        if cause is None:
            raise UserError(
                f"{str(checkpoint.path)!r} describes {', '.join(sections)} that cannot be built ({first_line(error)})."
            ) from error
        raise cause from error
    return built


def _parse(checkpoint: Checkpoint, sections: dict[str, dict[str, Any]]) -> tuple[ArgumentParser, Namespace]:
    for name, described in sections.items():
        check_trusted_classes(
            described, str(checkpoint.path), trusted=checkpoint.trusted, strings=name != "data"
        )  # a folder of images can have a name like that of a class
    parser = ArgumentParser(exit_on_error=False)
    with restricted_imports(str(checkpoint.path), _allowed(checkpoint, sections)):
        for name in sections:
            parser.add_subclass_arguments(_SECTIONS[name][0], name, fail_untyped=False)
        return parser, parser.parse_object(sections)


def _allowed(checkpoint: Checkpoint, sections: dict[str, dict[str, Any]]) -> set[str]:
    path, trusted = str(checkpoint.path), checkpoint.trusted
    allowed: set[str] = set()
    for name, described in sections.items():
        allowed |= referenced_classes(
            described, path, trusted=trusted, types=_SECTIONS[name][1], strings=name != "data"
        )
    return allowed
