"""Where training prunes, masks or quantizes the network, the best checkpoint is one of the changed network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import MaskWeights, PruneNetwork, QuantizationAwareTraining
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]
CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "pruned": lambda: PruneNetwork(keep=0.5, epochs=[0, 2]),
    "masked": lambda: MaskWeights(sparsity=0.5, epochs=[1, 2]),
    "quantized": lambda: QuantizationAwareTraining(from_epoch=2),
}


class LogFallingScore(pl.Callback):
    """Logs a score that falls in each epoch, as it may where a network becomes smaller."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("score", float(-trainer.current_epoch))


class SaveInEpoch2(pl.Callback):
    """Saves a checkpoint within the epoch in which the network changes."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (2, 0):
            trainer.save_checkpoint(self.file)


def fit(make_trainer: Trainers, network: ResNet, change: str, folder: Path, resumed: Path | None = None) -> list[Any]:
    callbacks = [
        CALLBACKS[change](),
        LogFallingScore(),
        SaveInEpoch2(folder / "cut.ckpt"),
        EarlyStopping("score", mode="max", patience=3),
        ModelCheckpoint(folder / "saved", "best", monitor="score", mode="max"),
    ]
    trainer = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(TeacherModule(network), DigitsDataModule(batch_size=256), ckpt_path=resumed, weights_only=True)
    assert trainer.current_epoch == 4, "EarlyStopping must not stop for the lower score of the changed network"
    return [path.name for path in (folder / "saved").iterdir()]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("change", list(CALLBACKS))
def test_the_best_checkpoint_is_chosen_among_the_epochs_after_the_change(
    change: str, resume: bool, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    files = fit(make_trainer, small(8), change, tmp_path)
    if resume:
        files = fit(make_trainer, small(8), change, tmp_path, tmp_path / "cut.ckpt")
    assert files == ["best.ckpt"]
    best = torch.load(tmp_path / "saved/best.ckpt", weights_only=True)
    assert best["epoch"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "pruned",
            r"PruneNetwork prunes in epoch 2, counted from 0, but the training ends after 2 epochs; set trainer",
        ),
        ("masked", r"MaskWeights masks in epoch 2"),
        ("quantized", r"QuantizationAwareTraining starts in epoch 2"),
    ],
)
def test_a_change_after_the_last_epoch_is_refused(
    change: str, message: str, small: Networks, make_trainer: Trainers
) -> None:
    trainer = make_trainer(max_epochs=2, callbacks=[CALLBACKS[change]()])
    with pytest.raises(ValueError, match=message):
        trainer.fit(TeacherModule(small(8)), DigitsDataModule(batch_size=256))
