"""Lightning's reading and writing of checkpoints, atomic and as data."""

import copy
import os
from glob import escape
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.files.atomic import atomic_write


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint whole or not at all, and reads one as data while comparing its checksums.

    Tensors are saved from the CPU, so that a machine without the training device can load them. Lightning's own
    implementation moves files between file systems, where a kill leaves half a file; it still handles addresses
    (``s3://...``), which only it can reach.

    Args:
        opened: A checkpoint that was opened before; when Lightning loads it, its file is not read again.
    """

    def __init__(self, opened: Checkpoint | None = None) -> None:
        self._opened = opened
        self._folders: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint next to its path and move it there."""
        self._folders.add(os.path.dirname(path))
        if "://" in str(path):
            TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        for left in target.parent.glob(f"{escape(target.name)}.*.tmp"):  # by a run that was killed here
            left.unlink(missing_ok=True)
        with atomic_write(target) as file:
            torch.save(_on_cpu(checkpoint), file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint of a run; code in it is never run."""
        if "://" in str(path):
            return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only=True)
        opened = self._opened
        if opened is None or opened.path != Path(path):
            return Checkpoint.of_run(path).content
        self._opened = None  # Lightning may change the content, and its memory is needed no longer
        return opened.content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it is in a folder in which this run has written one.

        The file that a run resumes from names the checkpoint to delete: it could name any path, and Lightning deletes
        folders as well.
        """
        if os.path.dirname(path) in self._folders and str(path).endswith(".ckpt"):
            TorchCheckpointIO().remove_checkpoint(path)


def _on_cpu(value: object) -> object:
    """Return a checkpoint with its tensors on the CPU; those that are there already are not copied."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, with a state dict's metadata
        copied.update({key: _on_cpu(part) for key, part in value.items()})
        return copied
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(_on_cpu, value))
    return value


def use_atomic_checkpoints(strategy: Strategy, opened: Checkpoint | None = None) -> None:
    """Replace the I/O of a strategy, unless its checkpoints are not plain files on this machine.

    Args:
        strategy: The Trainer's strategy.
        opened: A checkpoint that was opened before, and that Lightning will load.
    """
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO(opened)
