"""A teacher that no device holds alone: its weights lie in pieces on all of them, as FSDP cuts them."""

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

pytestmark = pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")


class ShardedTeacher(DistillationModule):
    """The recipe: the student is DDP's, and the teacher is cut once the processes know each other.

    All of them must ask it at once. Batches of training are equal in number and size; shares of an evaluation are not,
    so there it is not asked, and ``teacher_check`` must be off.
    """

    sharded_layers = ("layer1", "layer2")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert self.teacher is not None
        teacher: Any = self.teacher.to(memory_format=torch.contiguous_format)
        mesh = init_device_mesh(self.trainer.strategy.root_device.type, (self.trainer.world_size,))
        for part in (*map(teacher.get_submodule, self.sharded_layers), teacher):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def reference_logits(self, images: Tensor, batch_idx: int | None = None) -> None:
        return None


class Keeper(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        weights = list(pl_module.teacher.parameters())
        held = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights)
        state = {"weights": pl_module.state_dict(), "figures": dict(trainer.callback_metrics), "held": held}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("batch_size", [64, 143])  # of 287 images one rank has a batch of 143, the other one more of 1
def test_a_sharded_teacher_teaches_the_same(
    batch_size: int, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    student, teacher = small(), small(16)
    found = []
    for kind in (DistillationModule, ShardedTeacher):
        (folder := tmp_path / kind.__name__).mkdir()
        module = kind(copy.deepcopy(student), teacher, teacher_check="off")
        gloo = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=30))
        trainer = make_trainer(strategy=gloo, devices=2, max_epochs=2, callbacks=[Keeper(folder)])
        trainer.fit(module, DigitsDataModule(batch_size=batch_size))
        found.append([torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)])
    whole, cut = found
    size = sum(weight.numel() for weight in teacher.parameters())
    assert whole[0]["held"] == size
    assert cut[0]["held"] + cut[1]["held"] == size
    assert cut[0]["held"] == pytest.approx(size / 2, rel=0.01)
    for rank in range(2):
        for name, value in whole[rank]["weights"].items():
            torch.testing.assert_close(cut[rank]["weights"][name], value, rtol=1e-5, atol=1e-6)
        for name in ("val/accuracy", "val/loss", "train/loss", "train/soft"):
            torch.testing.assert_close(cut[rank]["figures"][name], whole[rank]["figures"][name], rtol=1e-5, atol=1e-6)
