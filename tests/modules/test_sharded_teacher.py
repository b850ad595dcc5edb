"""A teacher too large for one device: FSDP shards its weights over all of them."""

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
    """What a user writes: the student is wrapped by DDP, and the teacher is sharded in setup.

    All ranks must run the teacher at the same time, which they do in training. In an evaluation ranks may have
    different numbers of batches, so the teacher is not run there, and ``teacher_check`` must be off.
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


class WriteRankResults(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        weights = list(pl_module.teacher.parameters())
        local_size = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)
        state = {"weights": pl_module.state_dict(), "metrics": dict(trainer.callback_metrics), "local_size": local_size}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("batch_size", [64, 143])  # of 287 images one rank has 143, the other 144: a second batch
def test_a_sharded_teacher_gives_the_same_training(
    batch_size: int, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    student, teacher = small(), small(16)
    results = []
    for kind in (DistillationModule, ShardedTeacher):
        (folder := tmp_path / kind.__name__).mkdir()
        module = kind(copy.deepcopy(student), teacher, teacher_check="off")
        gloo = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=30))
        trainer = make_trainer(strategy=gloo, devices=2, max_epochs=2, callbacks=[WriteRankResults(folder)])
        trainer.fit(module, DigitsDataModule(batch_size=batch_size))
        results.append([torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)])
    whole, sharded = results
    size = sum(weight.numel() for weight in teacher.parameters())
    assert whole[0]["local_size"] == size
    assert sharded[0]["local_size"] + sharded[1]["local_size"] == size
    assert sharded[0]["local_size"] == pytest.approx(size / 2, rel=0.01)
    for rank in range(2):
        for name, value in whole[rank]["weights"].items():
            torch.testing.assert_close(sharded[rank]["weights"][name], value, rtol=1e-5, atol=1e-6)
        for name in ("val/accuracy", "val/loss", "train/loss", "train/soft"):
            torch.testing.assert_close(
                sharded[rank]["metrics"][name], whole[rank]["metrics"][name], rtol=1e-5, atol=1e-6
            )
