"""How the trainer's checkpoints reach the disk and come back."""

import copy
import os
from glob import escape
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.networks import read_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint whole or not at all, and reads one as data, its checksums compared.

    Tensors are saved from the CPU, so that a machine without the device of the training loads them. Lightning's own
    way moves files from one file system to another, where a kill leaves half a file. It is left the addresses
    (``s3://...``) that it knows how to reach.
    """

    def __init__(self) -> None:
        self._folders: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it beside its place and move it there."""
        self._folders.add(os.path.dirname(path))
        if "://" in str(path):
            TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        for left in place.parent.glob(f"{escape(place.name)}.*.tmp"):  # by a run that was killed here
            left.unlink(missing_ok=True)
        with atomic_write(place) as file:
            torch.save(_on_cpu(checkpoint), file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read it; code in it is refused."""
        if "://" in str(path):
            return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only=True)
        return read_run_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it, if it lies beside one that was written here.

        Which one a run supersedes is said by the file that it goes on from: any path, and Lightning deletes folders.
        """
        if os.path.dirname(path) in self._folders and str(path).endswith(".ckpt"):
            TorchCheckpointIO().remove_checkpoint(path)


def _on_cpu(value: Any) -> Any:
    """Copy the tensors in a checkpoint to the CPU; what is there already is not copied."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, with a state dict's metadata
        copied.update({key: _on_cpu(part) for key, part in value.items()})
        return copied
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def read_run_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, carries code, or holds weights alone.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get("state_dict"), dict) or "pytorch-lightning_version" not in content:
        raise UserError(
            f"{str(path)!r} is no checkpoint of a run; to use the weights in it, fill a network with from_checkpoint."
        )
    return content


def use_atomic_checkpoints(strategy: Strategy) -> None:
    """Have a strategy write and read so, unless its checkpoints are no plain files on this machine."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
