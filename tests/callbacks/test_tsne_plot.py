"""The t-SNE plot of two domains, which does not change training."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.manifold import TSNE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import Permute

from kd_lightning import AdaptationModule, DigitsDataModule, DomainPairDataModule
from kd_lightning.callbacks import TSNEPlot
from kd_lightning.networks import LeNet

Trainers = Callable[..., pl.Trainer]


def fit_with_callbacks(make_trainer: Trainers, *callbacks: pl.Callback, **options: Any) -> AdaptationModule:
    torch.manual_seed(0)
    module = AdaptationModule(LeNet(image_size=8, width=8), learning_rate=0.01)
    pair = DomainPairDataModule(DigitsDataModule(batch_size=256), DigitsDataModule(mean=[0.5], batch_size=256))
    make_trainer(max_epochs=1, callbacks=list(callbacks), **options).fit(module, pair)
    return module


def test_the_plot_is_written_to_the_run_s_folder_and_tensorboard(make_trainer: Trainers, tmp_path: Path) -> None:
    picture = TSNEPlot("embedding", images=20)
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="run")
    fit_with_callbacks(make_trainer, picture, logger=logger)
    with Image.open(tmp_path / "run" / "embedding.png") as drawn:
        assert drawn.size[0] > 800
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert "embedding" in events.Tags()["images"]
    before, after = picture.state_dict()["embedded"].values()
    assert before.shape == after.shape == (40, 3)
    assert not torch.allclose(before[:, :2], after[:, :2])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_plot_of_plain_loaders(make_trainer: Trainers, tmp_path: Path) -> None:
    images, rows = torch.rand(12, 1, 8, 8), torch.eye(10)[torch.arange(12) % 10]
    source, target = (
        DataLoader(TensorDataset(images, rows), batch_size=6),
        DataLoader(TensorDataset(images), batch_size=6),
    )
    module, loaders = AdaptationModule(LeNet(image_size=8, width=4)), {"source": source, "target": target}
    make_trainer(callbacks=[TSNEPlot("embedding", images=10)]).fit(module, loaders, loaders)
    assert (tmp_path / "embedding.png").is_file()


def test_the_plot_does_not_change_training(make_trainer: Trainers) -> None:
    expected = fit_with_callbacks(make_trainer)
    module = fit_with_callbacks(make_trainer, TSNEPlot("conv2", images=20))
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name]), name


class ChannelsLast(nn.Sequential):
    """Its layer ``last`` has the channels last, as in Swin, and ``first`` and ``tokens`` the same values otherwise."""

    def __init__(self) -> None:
        layers = {
            "conv": nn.Conv2d(1, 5, 3),
            "permuted": Permute([0, 2, 3, 1]),
            "last": nn.LayerNorm(5),
            "first": Permute([0, 3, 1, 2]),
            "flat": nn.Flatten(2),
            "tokens": Permute([0, 2, 1]),
            "back": Permute([0, 2, 1]),
            "pool": nn.AdaptiveAvgPool1d(1),
            "vectors": nn.Flatten(),
            "fc": nn.Linear(5, 10),
        }
        super().__init__(OrderedDict(layers))


def test_maps_with_the_channels_last_and_tokens_are_averaged_over_their_places(
    make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor] = []

    def fit_transform(self: TSNE, rows: np.ndarray) -> np.ndarray:
        found.append(torch.from_numpy(rows))
        return rows[:, :2]

    monkeypatch.setattr(TSNE, "fit_transform", fit_transform)
    for layer in ("vectors", "last", "first", "tokens"):
        torch.manual_seed(0)
        pair = DomainPairDataModule(DigitsDataModule(batch_size=256), DigitsDataModule(mean=[0.5], batch_size=256))
        trainer = make_trainer(max_epochs=1, limit_train_batches=1, callbacks=[TSNEPlot(layer, images=20)])
        trainer.fit(AdaptationModule(ChannelsLast(), learning_rate=0.01), pair)
    assert found[0].shape == (40, 5)
    for rows in found[2::2]:  # those before training
        torch.testing.assert_close(rows, found[0])


def test_the_embedding_before_training_is_restored_on_resume() -> None:
    picture = TSNEPlot()
    picture.load_state_dict({"embedded": {"before": torch.zeros(4, 3)}})
    assert list(picture.state_dict()["embedded"]) == ["before"]


def test_an_unknown_layer_is_refused(make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="has no layer 'nope'"):
        fit_with_callbacks(make_trainer, TSNEPlot("nope"))
    with pytest.raises(ValueError, match="images must be >= 10"):
        TSNEPlot(images=3)
