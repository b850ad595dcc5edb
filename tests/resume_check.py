"""Whether a run that is cut within an epoch resumes to the weights of one that was not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

Trainers = Callable[..., pl.Trainer]


class Cut(pl.Callback):
    """Saves after a batch and ends the training there."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


class SaveEach(pl.Callback):
    """A checkpoint after each batch and each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: list[Path] = []

    def save(self, trainer: pl.Trainer, name: str) -> None:
        self.places.append(self.folder / f"{name}.ckpt")
        trainer.save_checkpoint(self.places[-1])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, f"epoch {trainer.current_epoch} batch {trainer.fit_loop.batch_idx}")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, f"epoch {trainer.current_epoch} ended")


class Dropping(nn.Module):
    """A network with dropout, which gives NaN for images that are all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.fc = nn.Conv2d(1, 8, 3), nn.Dropout(0.5), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(self.drop(self.body(images).relu().mean((2, 3))))
        return logits * (images.abs().amax() / images.abs().amax())


def check_resume(
    make_trainer: Trainers,
    folder: Path,
    data: Callable[[], Any],
    kind: Callable[..., Any],
    callbacks: list[pl.Callback] | None = None,
    **parts: Callable[[], Any],
) -> None:
    """Cut a run within its second epoch, resume it, and compare its weights with those of a run that was not cut.

    Args:
        make_trainer: Takes ``callbacks`` and trains for three epochs of three batches.
        folder: Where the checkpoint goes.
        data: Makes a data module.
        kind: The module's class.
        callbacks: Copied for each run.
        **parts: What makes each argument of the module.
    """

    def run(*more: pl.Callback, **fit: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module = kind(**{name: part() for name, part in parts.items()})
        own = copy.deepcopy(callbacks or [])
        make_trainer(callbacks=[*own, *more]).fit(module, data(), **fit)
        return module.state_dict()

    whole = run()
    with pytest.raises(InterruptedError):
        run(Cut(4, folder / "cut.ckpt"))
    saved = torch.load(folder / "cut.ckpt", weights_only=True)
    assert {tensor.device.type for tensor in tensors_in(saved)} == {"cpu"}
    resumed = run(ckpt_path=folder / "cut.ckpt", weights_only=True)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
