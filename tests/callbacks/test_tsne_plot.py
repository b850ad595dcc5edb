"""The picture of two domains, and that it changes nothing of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_lightning import AdaptationModule, DigitsDataModule, DomainPairDataModule
from kd_lightning.callbacks import TSNEPlot
from kd_lightning.networks import LeNet

Trainers = Callable[..., pl.Trainer]


def adapted(make_trainer: Trainers, *callbacks: pl.Callback, **options: Any) -> AdaptationModule:
    torch.manual_seed(0)
    module = AdaptationModule(LeNet(image_size=8, width=8), learning_rate=0.01)
    pair = DomainPairDataModule(DigitsDataModule(batch_size=256), DigitsDataModule(mean=[0.5], batch_size=256))
    make_trainer(max_epochs=1, callbacks=list(callbacks), **options).fit(module, pair)
    return module


def test_it_is_drawn_into_the_runs_folder_and_tensorboard(make_trainer: Trainers, tmp_path: Path) -> None:
    picture = TSNEPlot("embedding", images=20)
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="run")
    adapted(make_trainer, picture, logger=logger)
    with Image.open(tmp_path / "run" / "embedding.png") as drawn:
        assert drawn.size[0] > 800
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert "embedding" in events.Tags()["images"]
    before, after = picture.state_dict()["embedded"].values()
    assert before.shape == after.shape == (40, 3)
    assert not torch.allclose(before[:, :2], after[:, :2])


def test_it_changes_nothing_of_the_training(make_trainer: Trainers) -> None:
    plain = adapted(make_trainer)
    watched = adapted(make_trainer, TSNEPlot("conv2", images=20))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name


def test_what_was_seen_before_outlives_a_cut() -> None:
    picture = TSNEPlot()
    picture.load_state_dict({"embedded": {"before": torch.zeros(4, 3)}})
    assert list(picture.state_dict()["embedded"]) == ["before"]


def test_a_layer_that_is_not_there_is_refused(make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="has no layer 'nope'"):
        adapted(make_trainer, TSNEPlot("nope"))
    with pytest.raises(ValueError, match="images must be >= 10"):
        TSNEPlot(images=3)
