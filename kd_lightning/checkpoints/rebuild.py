"""Rebuilds a module from a checkpoint, which is read once and as data."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.saving import _load_state, load_hparams_from_yaml

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.trust import (
    check_trusted_classes,
    referenced_classes,
    restricted_imports,
    strip_pretrained,
)
from kd_lightning.errors import UserError


def rebuild_module(
    cls: type[pl.LightningModule],
    checkpoint: str | Path | Checkpoint,
    arguments: Mapping[str, Any],
    *,
    network: str,
    map_location: str | torch.device | None = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
) -> Any:
    """Rebuild a module and load its state.

    Lightning's own way reads the file again, and it has no public way to pass the content.

    Args:
        cls: Class of the module.
        checkpoint: Checkpoint of a run, or its path.
        arguments: Arguments of the module in place of those in the checkpoint.
        network: Name of the argument for the trained network.
        map_location: Device of the module; the CPU by default.
        hparams_file: YAML file of hyper-parameters to use in place of those in the checkpoint.
        strict: As in ``load_state_dict``.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged, names classes that it may not name, or was saved from Python and networks or
            losses are not passed again.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.of_run(checkpoint)
    path, saved, trusted = str(checkpoint.path), checkpoint.hyper_parameters, checkpoint.trusted
    described = {name: value for name, value in saved.items() if name not in arguments}
    check_trusted_classes(described, path, trusted=trusted)
    allowed = referenced_classes(described, path, trusted=trusted)
    _check_complete(cls, checkpoint, network, {*saved, *arguments})
    replaced = dict(arguments)
    if network in described:
        replaced[network] = strip_pretrained(saved[network])  # all weights are in this checkpoint
    if hparams_file is not None:
        saved = load_hparams_from_yaml(hparams_file)
    content = {
        **checkpoint.content,
        "state_dict": copy.copy(checkpoint.content["state_dict"]),
        cls.CHECKPOINT_HYPER_PARAMS_KEY: {**saved, **replaced},
    }
    with restricted_imports(path, allowed):
        module: Any = _load_state(cls, content, strict=strict, **replaced)
    return module if map_location is None else module.to(map_location)


def _check_complete(cls: type, checkpoint: Checkpoint, network: str, known: set[str]) -> None:
    if network not in known:
        raise UserError(
            f"{str(checkpoint.path)!r} was saved from Python, which keeps weights and no code; pass the network "
            f"again: {cls.__name__}.load_from_checkpoint(path, {network}=...)."
        )
    learned = any(key.startswith("losses.") for key in checkpoint.state_dict)
    if learned and "losses" in inspect.signature(cls).parameters and "losses" not in known:
        raise UserError(
            f"{str(checkpoint.path)!r} was saved from Python with losses that have learned parts; pass losses=... "
            "again as well."
        )
