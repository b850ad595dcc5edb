"""Rebuilds a module from a checkpoint, which is read once and as data."""

import copy
import inspect
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


def load_from_checkpoint(
    cls: type[pl.LightningModule],
    /,
    checkpoint_path: str | Path | Checkpoint,
    map_location: str | torch.device | None = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = True,
    **kwargs: Any,
) -> Any:
    """Rebuild a module from a checkpoint as Lightning does, but read the file as data.

    Its checksums are compared, and it may only name networks, losses, optimizers and schedulers of kd_lightning, torch,
    torchvision and modules that are already imported. Code in it is not run, whatever ``weights_only`` is. An open
    :class:`Checkpoint` is not read again.

    Args:
        cls: Class of the module.
        checkpoint_path: Path of a checkpoint of a run, or an open checkpoint.
        map_location: Device of the module; the CPU by default.
        hparams_file: YAML file of hyper-parameters to use in place of those in the checkpoint.
        strict: As in ``load_state_dict``.
        weights_only: Not used.
        **kwargs: Arguments of the module in place of those in the checkpoint.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged, contains code, names anything else, or was saved from Python and networks or
            losses are not passed again.
    """
    network: str = cls.network_argument  # type: ignore[attr-defined]
    checkpoint = checkpoint_path if isinstance(checkpoint_path, Checkpoint) else Checkpoint.of_run(checkpoint_path)
    path, saved, trusted = str(checkpoint.path), checkpoint.hyper_parameters, checkpoint.trusted
    described = {name: value for name, value in saved.items() if name not in kwargs}
    check_trusted_classes(described, path, trusted=trusted)
    allowed = referenced_classes(described, path, trusted=trusted)
    _check_complete(cls, checkpoint, network, {*saved, *kwargs})
    replaced = dict(kwargs)
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
        # Lightning's own way reads the file again, and it has no public way to pass the content
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
