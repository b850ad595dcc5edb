"""The reason of an early stop is logged, and the mode of a callback must fit its metric."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.errors import UserError
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]


def test_early_stopping_logs_its_reason_also_after_a_resume(
    small: Callable[[], ResNet],
    digits: DigitsDataModule,
    make_trainer: Trainers,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"limit_train_batches": 1, "max_epochs": 9}
    trainer = make_trainer(callbacks=[EarlyStopping("val/loss", patience=1, min_delta=5.0)], **options)
    module = TeacherModule(small())
    with caplog.at_level("INFO"):
        trainer.fit(module, digits)
    assert "EarlyStopping ended the training after epoch 2 of 9: Monitored metric val/loss did not" in caplog.text
    assert "a larger patience" in caplog.text
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    caplog.clear()
    again = make_trainer(
        callbacks=[EarlyStopping("val/loss", patience=1, min_delta=5.0)], **{**options, "max_epochs": 12}
    )
    with caplog.at_level("INFO"):
        again.fit(TeacherModule(small()), digits, ckpt_path=tmp_path / "stopped.ckpt")
    assert "EarlyStopping ended the training after epoch 3 of 12" in caplog.text
    caplog.clear()
    longer = make_trainer(callbacks=[EarlyStopping("val/loss", patience=99)], **{**options, "max_epochs": 4})
    with caplog.at_level("INFO"):
        longer.fit(TeacherModule(small()), digits, ckpt_path=tmp_path / "stopped.ckpt")
    assert longer.current_epoch == 4
    assert "ended the training" not in caplog.text


@pytest.mark.parametrize(
    "callback",
    [EarlyStopping("val/accuracy"), EarlyStopping("train/loss", mode="max"), ModelCheckpoint(monitor="val/accuracy")],
)
def test_a_mode_that_contradicts_its_metric_is_refused(
    small: Callable[[], ResNet], digits: DigitsDataModule, make_trainer: Trainers, callback: pl.Callback
) -> None:
    with pytest.raises(UserError, match=r"has mode='(min|max)', but (val/accuracy|train/loss) improves as it"):
        make_trainer(callbacks=[callback], enable_checkpointing=True).fit(TeacherModule(small()), digits)
