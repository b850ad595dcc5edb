"""The running average of the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from resume_check import check_resume

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import AverageWeights
from kd_lightning.callbacks.average_weights import decay_of
from kd_lightning.networks import ResNet


class Recorder(pl.Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.weights.append(pl_module.network.fc.weight.detach().clone())  # type: ignore[union-attr, operator]


def test_the_average_is_the_published_recursion(
    small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer], digits: DigitsDataModule
) -> None:
    recorder, module = Recorder(), TeacherModule(small())
    make_trainer(max_epochs=2, callbacks=[recorder, AverageWeights(decay=0.6)]).fit(module, digits)
    average = recorder.weights[0].clone()
    for updates, weight in enumerate(recorder.weights[1:], 1):
        decay = min(0.6, (1 + updates) / (10 + updates))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(module.network.fc.weight.detach(), average)  # type: ignore[union-attr, operator]
    assert not torch.equal(average, recorder.weights[-1])


def test_the_decay_rises_to_the_largest() -> None:
    decays = [decay_of(updates, 0.99) for updates in range(2000)]
    assert decays == sorted(decays)
    assert (decays[0], decays[-1]) == (0.1, 0.99)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 2.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"^decay must be between 0 and 1, got {decay}\.$"):
        AverageWeights(decay=decay)


def test_a_run_resumes_to_the_same_average(
    small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    def trainer(**options: Any) -> pl.Trainer:
        return make_trainer(max_epochs=3, limit_train_batches=3, **options)

    def data() -> DigitsDataModule:
        return DigitsDataModule(batch_size=32)

    check_resume(trainer, tmp_path, data, TeacherModule, [AverageWeights()], network=small)
