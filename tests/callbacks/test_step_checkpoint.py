from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import StepCheckpoint
from kd_lightning.networks import ResNet


@pytest.mark.parametrize(("every", "accumulate", "steps"), [(2, 1, [2, 4]), (1, 2, [1, 2]), (0, 1, [])])
def test_a_checkpoint_is_saved_every_n_optimizer_steps(
    every: int, accumulate: int, steps: list[int], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    saved = []

    class RecordSavedSteps(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            for path in tmp_path.rglob("last-step.ckpt"):
                saved.append(torch.load(path, weights_only=True)["global_step"])

    trainer = make_trainer(callbacks=[StepCheckpoint(every), RecordSavedSteps()], accumulate_grad_batches=accumulate)
    module = TeacherModule(ResNet([1, 1], [4, 8], in_channels=1))
    trainer.fit(module, DigitsDataModule(batch_size=256))  # five batches
    assert sorted(set(saved)) == steps


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps must be >= 0, got -1"):
        StepCheckpoint(-1)
