"""What losses learn or keep is saved with the student and rebuilt from shapes; what they refer to is not."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.losses import (
    CTKDLoss,
    DistillationLoss,
    DistPlusLoss,
    HardTargetLoss,
    QueueKLLoss,
    SDDKDLoss,
    USKDLoss,
    WKDLogitLoss,
)
from kd_lightning.networks import ResNet

KEPT: dict[str, tuple[Callable[[], DistillationLoss], set[str]]] = {
    "ctkd": (CTKDLoss, {"global_T"}),
    "uskd": (USKDLoss, {"fc.weight", "fc.bias"}),
    "queue_kl": (lambda: QueueKLLoss(queue_size=32), {"queue", "heads.0.weight", "heads.0.bias"}),
    "dist_plus": (lambda: DistPlusLoss(student_layers=["layer2"]), {"regressor.weight"}),
    "sdd_kd": (lambda: SDDKDLoss(student_layers=["layer2"]), set()),
    "wkd_l": (lambda: WKDLogitLoss(gamma=1.0), set()),
}
"""Losses with state, and the names of it."""


@pytest.mark.parametrize("name", list(KEPT))
def test_a_student_is_rebuilt_with_what_its_loss_keeps_and_without_a_teacher(
    name: str, small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    make, expected = KEPT[name]

    def losses() -> dict[str, DistillationLoss]:
        return {"hard": HardTargetLoss(), "mine": make()}

    module = DistillationModule(small(), small(8), losses=losses(), teacher_check="off")
    started = {key: value.clone() for key, value in module.losses.state_dict().items()}
    trainer = make_trainer(limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, DigitsDataModule(batch_size=16))
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    kept = {key.removeprefix("losses.mine."): value for key, value in saved.items() if key.startswith("losses.")}
    assert set(kept) == expected
    for key, value in started.items():
        assert not torch.equal(kept[key.removeprefix("mine.")], value), f"{key} does not train"
    rebuilt = DistillationModule.load_from_checkpoint(
        tmp_path / "student.ckpt", student=small(), teacher=None, losses=losses()
    )
    for key, value in rebuilt.state_dict().items():
        assert torch.equal(value, saved[key]), key
    make_trainer(limit_test_batches=1).test(rebuilt, DigitsDataModule(batch_size=16), verbose=False)


@pytest.mark.parametrize("name", ["sdd_kd", "wkd_l"])
def test_an_averaged_copy_of_the_module_trains_too(
    name: str, small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer]
) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    losses: dict[str, DistillationLoss] = {"hard": HardTargetLoss(), "mine": KEPT[name][0]()}
    module = DistillationModule(small(), small(8), losses=losses, teacher_check="off")
    make_trainer(callbacks=[EMAWeightAveraging(decay=0.9)], limit_train_batches=3).fit(
        module, DigitsDataModule(batch_size=16)
    )
    assert all(torch.isfinite(weight).all() for weight in module.parameters())
