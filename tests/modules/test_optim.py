"""Optimizers and schedulers of a user's choice, in a run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.modules.optim import build_scheduler
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

SGD = partial(torch.optim.SGD, lr=0.1)


class Steps(pl.Callback):
    taken = 0

    def on_before_zero_grad(self, *_: Any) -> None:
        self.taken += 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, r"The optimizer cannot be built \(LBFGS doesn't support per-parameter"),
        ({"optimizer": partial(torch.optim.SGD, lr=-1)}, r"cannot be built \(Invalid learning rate: -1\); correct its"),
        ({"optimizer": torch.optim.SparseAdam}, "SparseAdam only supports sparse gradients"),
        ({"lr_scheduler": partial(StepLR, step_size=0)}, "The lr_scheduler cannot be built .*zero"),
        ({"lr_scheduler": StepLR}, "The lr_scheduler cannot be built .*'step_size'"),
        ({"lr_scheduler": partial(CosineAnnealingLR, T_max=0)}, "The lr_scheduler cannot be built .*zero"),
        ({"lr_scheduler": partial(ReduceLROnPlateau, factor=1.0)}, r"cannot be built \(Factor should be < 1.0\)"),
        ({"lr_scheduler": ReduceLROnPlateau, "lr_interval": "step"}, "ReduceLROnPlateau monitors val/loss"),
        (
            {"lr_scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=5), "lr_interval": "step"},
            "OneCycleLR ends after 5 steps but the run after 8; set total_steps to 8",
        ),
        (
            {"lr_scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=1)},
            "OneCycleLR ends after 1 epochs but the run after 2; set total_steps to 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, options: dict[str, Any], message: str
) -> None:
    watch = Steps()
    trainer = make_trainer(max_epochs=2, limit_train_batches=4, callbacks=[watch])
    with pytest.raises(ValueError, match=message):
        trainer.fit(TeacherModule(small(), **{"optimizer": SGD, **options}), digits)
    assert watch.taken == 0


def test_a_plateau_without_validation_is_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    module = TeacherModule(small(), optimizer=SGD, lr_scheduler=ReduceLROnPlateau)
    with pytest.raises(ValueError, match="keep the validation"):
        make_trainer(limit_val_batches=0).fit(module, digits)


def test_a_plateau_moves_where_there_was_a_validation(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    module = TeacherModule(small(), optimizer=SGD, lr_scheduler=ReduceLROnPlateau)
    trainer = make_trainer(max_epochs=5, check_val_every_n_epoch=2, limit_train_batches=1)
    trainer.fit(module, digits)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval':RuntimeWarning")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_cycle_as_long_as_the_run_fits(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, interval: Any
) -> None:
    cycle = partial(OneCycleLR, max_lr=0.1, total_steps=6 if interval == "step" else 2)
    trainer = make_trainer(max_epochs=2, limit_train_batches=3)
    trainer.fit(TeacherModule(small(), optimizer=SGD, lr_scheduler=cycle, lr_interval=interval), digits)
    assert trainer.global_step == 6


def test_the_trial_of_a_scheduler_leaves_the_optimizer_alone(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    optimizer = torch.optim.AdamW(small().parameters(), lr=0.5)
    schedule = build_scheduler(partial(StepLR, step_size=1), optimizer, "epoch", make_trainer())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert schedule["scheduler"].last_epoch == 0


def test_a_network_of_frozen_weights_is_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    with pytest.raises(ValueError, match="All weights are frozen"):
        make_trainer().fit(TeacherModule(small().requires_grad_(False)), digits)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning")
def test_the_default_optimizer_can_be_clipped_in_each_precision(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, precision: Any, algorithm: str
) -> None:
    trainer = make_trainer(max_steps=2, precision=precision, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    trainer.fit(TeacherModule(small()), digits)
    assert trainer.global_step == 2


def test_a_fused_optimizer_cannot_be_clipped_under_mixed_precision(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    module = TeacherModule(small(), optimizer=partial(torch.optim.AdamW, fused=True))
    with pytest.raises(ValueError, match=r"fused AdamW; remove fused=True or gradient_clip_val"):
        make_trainer(precision="bf16-mixed", gradient_clip_val=0.5).fit(module, digits)
    make_trainer(precision="bf16-mixed", max_steps=1).fit(module, digits)
