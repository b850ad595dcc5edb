"""A run that ended after an epoch goes on to the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


class StopAfter(pl.Callback):
    """Ends a run after an epoch, as somebody who needs the machine would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def test_a_run_that_ended_goes_on_to_the_same_bits(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    teacher = small(8)

    def run(callbacks: list[Any], path: Path | None = None) -> tuple[dict[str, Tensor], pl.Trainer]:
        torch.manual_seed(1)
        student: nn.Module = small()
        module = DistillationModule(student, teacher, teacher_check="off")
        trainer = make_trainer(max_epochs=4, callbacks=callbacks)
        trainer.fit(module, DigitsDataModule(batch_size=128), ckpt_path=path, weights_only=True)
        return module.state_dict(), trainer

    whole, _ = run([])
    part, stopped = run([StopAfter(1)])
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    assert not torch.equal(part["network.fc.weight"], whole["network.fc.weight"])
    torch.manual_seed(99)  # whatever else a new process does
    resumed, _ = run([], tmp_path / "last.ckpt")
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
