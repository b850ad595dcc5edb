"""Checkpoints within an epoch, and a stop on signals that loses nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT

from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.errors import UserError, add_user_message

_NAME = "last-step.ckpt"
"""Lightning also looks for ``last*`` where it resumes from the last checkpoint."""


class StepCheckpoint(CallbackWithoutIdleHooks):
    """Writes ``last-step.ckpt`` beside the other checkpoints: every N steps, and when a signal stops the run.

    SIGTERM and Ctrl-C (SIGINT) stop the run after the current batch, the same one in all processes, with the exit codes
    143 and 130; a second signal stops it immediately. If one of several processes dies, the others' error names it.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints; 0 to save only when the run is stopped.

    Raises:
        ValueError: If ``every_n_train_steps`` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StepCheckpoint(every_n_train_steps=500)], accelerator="cpu", logger=False)
    """

    def __init__(self, every_n_train_steps: int = 1000) -> None:
        if every_n_train_steps < 0:
            raise UserError(f"every_n_train_steps must be >= 0, got {every_n_train_steps}.")
        self.every_n_train_steps = every_n_train_steps
        self._signal = 0
        self._is_first = True
        self._saved_at = 0
        self._parent = os.getppid()
        self._handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers (Lightning's own communicates with other processes within a step)."""
        self._install_handlers(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        self._install_handlers(trainer)
        self._saved_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is due, or if a process received a signal."""
        signum = self._signal
        if trainer.world_size > 1:
            votes = torch.tensor(signum, device=trainer.strategy.root_device)
            signum = int(trainer.strategy.reduce(votes, reduce_op="max"))
        steps = trainer.global_step - self._saved_at
        if signum or (self.every_n_train_steps and steps >= self.every_n_train_steps):
            self._save(trainer)
        if signum:
            self._leave(trainer, signum)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Name a process that died, and restore the signal handlers."""
        if isinstance(exception, Exception) and trainer.world_size > 1:
            died = self._dead_process(trainer)
            if died:
                add_user_message(exception, f"{died}, so the run has ended; resume it with --ckpt_path last.")
        # not before: torchrun sends SIGTERM meanwhile, and Lightning would wait for the dead process
        self._restore_handlers()

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self._place(trainer), weights_only=False)

    def _place(self, trainer: pl.Trainer) -> Path:
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return Path(folders[0] if folders else Path(trainer.default_root_dir, "checkpoints"), _NAME)

    def _leave(self, trainer: pl.Trainer, signum: int) -> None:
        rank_zero_info(
            f"Stopped by {signal.Signals(signum).name} in epoch {trainer.current_epoch} after step "
            f"{trainer.global_step}; saved in {self._place(trainer)}, {_advice(self._place(trainer))}."
        )
        # Lightning's launcher treats any other exit code of a process as a failure, and kills the others
        raise SystemExit(0 if trainer.local_rank > 0 and not _external(trainer) else 128 + signum)

    def _install_handlers(self, trainer: pl.Trainer) -> None:
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        self._signal, self._is_first = 0, trainer.is_global_zero
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signal:
            raise SystemExit(128 + signum)
        self._signal = signum
        if signum == signal.SIGINT and self._is_first:  # print is not safe in a handler
            os.write(
                sys.stderr.fileno(), b"\nStopping after this step, with a checkpoint; Ctrl-C again stops at once.\n"
            )

    def _dead_process(self, trainer: pl.Trainer) -> str | None:
        processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        for _ in range(20):
            for rank, process in enumerate(processes, start=trainer.global_rank + 1):
                if process.poll():
                    code = process.returncode
                    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    return f"The process of rank {rank} (PID {process.pid}) ended with {how}"
            if not processes and os.getppid() != self._parent:
                return f"The process of rank {trainer.global_rank - trainer.local_rank} (PID {self._parent}) ended"
            time.sleep(0.05)
        return None


def _advice(checkpoint: Path) -> str:
    """Return how a run is resumed: with its command, or in Python with the checkpoint."""
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():
        return f"resume it with `kd-lightning fit -c {config.parent} --ckpt_path last`"
    return "resume it with ckpt_path, which takes that file"


def _external(trainer: pl.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is None or environment.creates_processes_externally
