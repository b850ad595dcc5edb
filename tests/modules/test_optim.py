"""Optimizers and schedulers that a user chooses."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import FreezeLayers, MaskWeights
from kd_lightning.errors import UserError
from kd_lightning.modules.optim import Optimization
from kd_lightning.modules.parameter_groups import layerwise_decay_groups
from kd_lightning.modules.schedule import build_scheduler
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

SGD = partial(torch.optim.SGD, lr=0.1)


class CountSteps(pl.Callback):
    count = 0

    def on_before_zero_grad(self, *_: Any) -> None:
        self.count += 1


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
def test_invalid_optimizers_and_schedulers_are_refused_before_the_first_step(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, options: dict[str, Any], message: str
) -> None:
    steps = CountSteps()
    trainer = make_trainer(max_epochs=2, limit_train_batches=4, callbacks=[steps])
    with pytest.raises(ValueError, match=message):
        trainer.fit(TeacherModule(small(), **{"optimizer": SGD, **options}), digits)
    assert steps.count == 0


def test_reduce_on_plateau_without_validation_is_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    module = TeacherModule(small(), optimizer=SGD, lr_scheduler=ReduceLROnPlateau)
    with pytest.raises(ValueError, match="keep the validation"):
        make_trainer(limit_val_batches=0).fit(module, digits)


def test_reduce_on_plateau_steps_only_after_a_validation(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    module = TeacherModule(small(), optimizer=SGD, lr_scheduler=ReduceLROnPlateau)
    trainer = make_trainer(max_epochs=5, check_val_every_n_epoch=2, limit_train_batches=1)
    trainer.fit(module, digits)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval':RuntimeWarning")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_one_cycle_schedule_as_long_as_the_run_is_accepted(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, interval: Any
) -> None:
    cycle = partial(OneCycleLR, max_lr=0.1, total_steps=6 if interval == "step" else 2)
    trainer = make_trainer(max_epochs=2, limit_train_batches=3)
    trainer.fit(TeacherModule(small(), optimizer=SGD, lr_scheduler=cycle, lr_interval=interval), digits)
    assert trainer.global_step == 6


def test_checking_a_scheduler_does_not_change_the_optimizer(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    optimizer = torch.optim.AdamW(small().parameters(), lr=0.5)
    schedule = build_scheduler(
        partial(StepLR, step_size=1), optimizer, interval="epoch", monitor="val/loss", trainer=make_trainer()
    )
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert schedule["scheduler"].last_epoch == 0


def test_a_network_without_trainable_weights_is_refused(
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


AdamW = torch.optim.AdamW


@pytest.mark.parametrize(
    ("options", "rate", "decay"),
    [
        ({}, 0.1, 5e-4),
        ({"learning_rate": 0.3}, 0.3, 5e-4),
        ({"weight_decay": 0.2}, 0.1, 0.2),
        ({"optimizer": AdamW}, 1e-3, 1e-2),
        ({"optimizer": torch.optim.SGD}, 1e-3, 0.0),
        ({"optimizer": AdamW, "learning_rate": 3e-4}, 3e-4, 1e-2),
        ({"optimizer": AdamW, "learning_rate": 3e-4, "weight_decay": 0.0}, 3e-4, 0.0),
        ({"optimizer": partial(AdamW, lr=0.01)}, 0.01, 1e-2),
        ({"optimizer": partial(AdamW, lr=0.01), "learning_rate": 0.01}, 0.01, 1e-2),
        ({"optimizer": partial(AdamW, lr=1e-3), "learning_rate": 3e-4}, 3e-4, 1e-2),
        ({"optimizer": lambda groups: AdamW(groups, lr=0.02), "weight_decay": 0.3}, 0.02, 0.3),
    ],
)
def test_the_optimizer_gets_the_given_learning_rate_and_weight_decay(
    small: Networks, options: dict[str, Any], rate: float, decay: float
) -> None:
    network = small()
    optimization = Optimization(**{"lr_scheduler": partial(StepLR, step_size=1), **options})
    optimizer = optimization.configure(network, network, pl.Trainer(logger=False))["optimizer"]
    decayed, exempt = optimizer.param_groups
    assert (decayed["lr"], exempt["lr"]) == (rate, rate)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (decay, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": partial(AdamW, lr=0.01), "learning_rate": 3e-4},
            r"The optimizer AdamW has lr=0.01 and the module learning_rate=0.0003; give one of them\.",
        ),
        (
            {"optimizer": lambda groups: AdamW(groups, weight_decay=0.2), "weight_decay": 0.1},
            r"has weight_decay=0.2 and the module weight_decay=0.1",
        ),
        (
            {"optimizer": torch.optim.Rprop, "weight_decay": 0.1},
            r"Rprop has no weight_decay, so weight_decay=0.1 would not be used; leave it out\.",
        ),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
    ],
)
def test_contradicting_learning_rates_or_weight_decays_are_refused(
    small: Networks, options: dict[str, Any], message: str
) -> None:
    network = small()
    with pytest.raises(UserError, match=message):
        Optimization(**options).configure(network, network, pl.Trainer(logger=False))


def test_a_run_with_the_learning_rate_finder_equals_one_with_its_suggestion(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    torch.manual_seed(0)
    first = TeacherModule(small())
    second = TeacherModule(copy.deepcopy(first.network))
    finder = LearningRateFinder(num_training_steps=15, min_lr=1e-3, early_stop_threshold=None)
    options: dict[str, Any] = {"max_epochs": 4, "limit_train_batches": 4}  # at least as many steps as the finder takes
    make_trainer(callbacks=[finder], **options).fit(first, digits)
    assert finder.optimal_lr is not None
    assert first.learning_rate is not None
    second.learning_rate = first.learning_rate
    assert first.learning_rate == finder.optimal_lr.suggestion()
    make_trainer(**options).fit(second, digits)
    for weight, same in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, same)


@pytest.mark.parametrize(
    "build", [TeacherModule, lambda network: DistillationModule(network, network, teacher_check="off")]
)
def test_callbacks_that_change_weights_act_after_a_search_for_the_learning_rate(
    small: Networks,
    digits: DigitsDataModule,
    make_trainer: Trainers,
    build: Callable[[nn.Module], TeacherModule | DistillationModule],
) -> None:
    torch.manual_seed(0)
    module = build(small())
    finder = LearningRateFinder(num_training_steps=15, min_lr=1e-3, early_stop_threshold=None)
    callbacks = [finder, FreezeLayers(until_epoch=1), MaskWeights(0.5)]
    trainer = make_trainer(max_epochs=5, limit_train_batches=4, callbacks=callbacks)
    trainer.fit(module, digits)
    (optimizer,) = trainer.optimizers
    assert optimizer.defaults["lr"] == module.learning_rate != 0.1
    trained = {weight for group in optimizer.param_groups for weight in group["params"]}
    assert trained == set(module.network.parameters())
    matrices = [layer.weight for layer in module.network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in matrices)
    assert zeros == pytest.approx(0.5 * sum(weight.numel() for weight in matrices), abs=1)


def test_a_resumed_run_does_not_search_another_learning_rate(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"limit_train_batches": 4}
    trainer = make_trainer(**options)
    trainer.fit(TeacherModule(small()), digits)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    finder = LearningRateFinder(num_training_steps=15, min_lr=1e-3, early_stop_threshold=None)
    with pytest.raises(UserError, match="A resumed run keeps its own learning rate; remove the callback"):
        make_trainer(max_epochs=9, callbacks=[finder], **options).fit(
            TeacherModule(small()), digits, ckpt_path=tmp_path / "first.ckpt"
        )


@pytest.mark.parametrize(
    ("monitor", "mode", "accepted"),
    [("val/loss", "max", None), ("val/accuracy", "min", None), ("val/loss", "min", 0), ("val/accuracy", "max", 0)],
)
def test_reduce_on_plateau_follows_lr_monitor_and_its_mode_must_fit(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, monitor: str, mode: Any, accepted: int | None
) -> None:
    module = TeacherModule(small(), lr_scheduler=partial(ReduceLROnPlateau, mode=mode), lr_monitor=monitor)
    trainer = make_trainer(limit_train_batches=1, max_epochs=1)
    if accepted is None:
        with pytest.raises(UserError, match=rf"ReduceLROnPlateau has mode='{mode}', but {monitor} improves .* or lr_"):
            trainer.fit(module, digits)
    else:
        trainer.fit(module, digits)
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, ReduceLROnPlateau)
        assert scheduler.best == pytest.approx(float(trainer.callback_metrics[monitor]))


def test_a_barebones_trainer_fits_and_tests(small: Networks, digits: DigitsDataModule, make_trainer: Trainers) -> None:
    bare = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_test_batches=1)
    for trainer in (bare, make_trainer(log_every_n_steps=0, limit_train_batches=2, max_epochs=1)):
        module = DistillationModule(small(), small(), teacher_check="off")
        trainer.fit(module, digits)
        trainer.test(module, digits)
        assert trainer.global_step == 2


class TinyTransformer(nn.Module):
    """Has the children of a Vision Transformer, where most layers are in one child."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3))
        self.embedding = nn.Linear(3, 3)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(3)))
        self.head = nn.Linear(3, 2)

    def no_weight_decay(self) -> set[str]:
        """Return the names, as timm's networks do."""
        return {"position", "head.weight"}


def test_each_block_of_a_transformer_has_its_own_learning_rate_scale() -> None:
    network = TinyTransformer()
    groups = layerwise_decay_groups(network, 0.5)
    scales = {weight: group["lr_scale"] for group in groups for weight in group["params"]}
    blocks = [scales[network.get_parameter(f"blocks.{index}.0.weight")] for index in range(3)]
    assert [*blocks, scales[network.head.weight]] == [1 / 8, 1 / 4, 1 / 2, 1]
    assert scales[network.embedding.weight] == scales[network.position] == 1 / 16


def test_parameters_named_by_no_weight_decay_do_not_decay() -> None:
    network = TinyTransformer()
    network_in_module = nn.ModuleDict({"network": network})
    for groups in (
        layerwise_decay_groups(network, 0.5),
        Optimization()
        .configure(network_in_module, network, pl.Trainer(logger=False, max_epochs=1, max_steps=9))["optimizer"]
        .param_groups,
    ):
        decay = {weight: group.get("weight_decay", 1.0) for group in groups for weight in group["params"]}
        assert decay[network.position] == decay[network.head.weight] == decay[network.embedding.bias] == 0.0
        assert decay[network.embedding.weight] > 0
