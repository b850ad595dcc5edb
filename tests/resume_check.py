"""Callbacks that save checkpoints, and a check that an interrupted run resumes to identical weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

Trainers = Callable[..., pl.Trainer]


class Interrupt(pl.Callback):
    """Saves a checkpoint after a batch, and raises there."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


class SaveAfterEachBatch(pl.Callback):
    """Saves a checkpoint after each batch of a run: ``3.ckpt`` after the third."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt")


class SaveAfterBatchesAndEpochs(pl.Callback):
    """Saves a checkpoint after each batch and after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def save(self, trainer: pl.Trainer, name: str) -> None:
        self.paths.append(self.folder / f"{name}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, f"epoch {trainer.current_epoch} batch {trainer.fit_loop.batch_idx}")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, f"epoch {trainer.current_epoch} ended")


def check_resume(
    make_trainer: Trainers,
    folder: Path,
    data: Callable[[], Any],
    kind: Callable[..., Any],
    callbacks: list[pl.Callback] | None = None,
    **parts: Callable[[], Any],
) -> None:
    """Interrupt a run within its second epoch, resume it, and compare its weights with those of an uninterrupted run.

    Args:
        make_trainer: Takes ``callbacks`` and trains for three epochs of three batches.
        folder: Folder of the checkpoint.
        data: Factory of the data module.
        kind: Class of the module.
        callbacks: Callbacks, which are copied for each run.
        **parts: Factories of the module's arguments, by name.
    """

    def run(*more: pl.Callback, **fit_options: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module = kind(**{name: part() for name, part in parts.items()})
        copied = copy.deepcopy(callbacks or [])
        make_trainer(callbacks=[*copied, *more]).fit(module, data(), **fit_options)
        return module.state_dict()

    expected = run()
    with pytest.raises(InterruptedError):
        run(Interrupt(4, folder / "interrupted.ckpt"))
    saved = torch.load(folder / "interrupted.ckpt", weights_only=True)
    assert {tensor.device.type for tensor in tensors_in(saved)} == {"cpu"}
    resumed = run(ckpt_path=folder / "interrupted.ckpt", weights_only=True)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
