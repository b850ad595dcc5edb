"""Two processes on one machine: the same mathematics, every sample counted once."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*"),
    pytest.mark.filterwarnings("ignore:.*barrier.*"),
    pytest.mark.filterwarnings("ignore:.*nn.parallel.*"),
]


class Keeper(pl.Callback):
    """Writes what a rank saw to a file, where the parent process can read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = {"weights": pl_module.state_dict(), "teacher": pl_module.teacher.state_dict()}
        if trainer.world_size > 1:  # what DDP's wrapper reduces and sends
            assert not any("teacher" in name for name in trainer.model.state_dict())  # type: ignore[union-attr]
            assert not any("teacher" in name for name, _ in trainer.model.named_buffers())  # type: ignore[union-attr]
        torch.save({**state, "figures": dict(trainer.callback_metrics)}, self.folder / f"{trainer.global_rank}.pt")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = {"figures": dict(trainer.callback_metrics), "confusion": pl_module.confusion}
        torch.save(state, self.folder / f"test{trainer.global_rank}.pt")


def _frozen_norms(network: nn.Module) -> nn.Module:
    """Without batch statistics, so that a batch may be cut into two without a change of the mathematics."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network


def _distil(trainer: pl.Trainer, student: nn.Module, teacher: nn.Module, batch_size: int) -> None:
    data = DigitsDataModule(batch_size=batch_size)
    module = DistillationModule(student, teacher, teacher_check="off")
    trainer.fit(module, data)


def test_two_processes_equal_one(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    student, teacher = _frozen_norms(small()), small(8)
    results = {}
    for world, batch_size in ((1, 128), (2, 64)):
        folder = tmp_path / str(world)
        folder.mkdir()
        options = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {"devices": 1}
        trainer = make_trainer(callbacks=[Keeper(folder)], max_epochs=2, num_sanity_val_steps=0, **options)
        _distil(trainer, copy.deepcopy(student), teacher, batch_size)
        results[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    (one,), (first, second) = results[1], results[2]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), f"the ranks differ in {key}"
        torch.testing.assert_close(value, one["weights"][key], rtol=1e-4, atol=1e-5)
    for key, value in teacher.state_dict().items():
        assert torch.equal(first["teacher"][key], value)
        assert torch.equal(second["teacher"][key], value)
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/agreement", "val/ece"):
        torch.testing.assert_close(first["figures"][name], one["figures"][name], rtol=1e-4, atol=1e-5)
        assert torch.equal(first["figures"][name], second["figures"][name])


def test_every_test_image_is_counted_once(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    """360 images in batches of 77 divide by nothing."""
    module = DistillationModule(small(), small(8))
    data = DigitsDataModule(batch_size=77)
    expected = make_trainer().test(module, data)[0]
    trainer = make_trainer(strategy="ddp_fork", devices=2, callbacks=[Keeper(tmp_path)])
    trainer.test(module, data)
    for rank in range(2):
        found = torch.load(tmp_path / f"test{rank}.pt", weights_only=True)
        assert found["confusion"].sum() == 360
        for name, value in expected.items():
            assert float(found["figures"][name]) == pytest.approx(value, abs=1e-6), name
