"""With cached features, frozen layers run once for each view of an image, and the head learns the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from resume_check import SaveAfterEachBatch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import FreezeLayers
from kd_lightning.networks import DataConfig, ResNet, set_data_config
from kd_lightning.teacher.feature_cache import FeatureCache

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]
TRAINING_IMAGES = 1150


class RecordTraining(pl.Callback):
    """Counts the training images that the frozen layers run on, and records the losses."""

    def __init__(self) -> None:
        self.images = 0
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.images += len(output) if trainer.training and len(output) > 4 else 0  # but for dry runs

        pl_module.network.conv1.register_forward_hook(count)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def fit_probe(
    make_trainer: Trainers, cache: bool | str, seed: int = 0, epochs: int = 5, views: int | None = 2, **options: Any
) -> tuple[RecordTraining, TeacherModule]:
    torch.manual_seed(seed)
    network = ResNet([1, 1], [4, 8], in_channels=1)
    torch.manual_seed(3)
    for name, weight in network.named_parameters():
        if not name.startswith("fc."):
            nn.init.normal_(weight, std=0.5)
    network(torch.randn(64, 1, 8, 8))  # sets the statistics of batch norms
    set_data_config(network, DataConfig.of((0.5,), (0.2,)))
    record, module = RecordTraining(), TeacherModule(network, feature_cache=cache, learning_rate=0.01)
    trainer = make_trainer(max_epochs=epochs, callbacks=[FreezeLayers(), record], limit_val_batches=0, **options)
    trainer.fit(module, DigitsDataModule(batch_size=200, views=views))
    return record, module


def test_training_on_cached_features_equals_training_without_a_cache(make_trainer: Trainers, tmp_path: Path) -> None:
    uncached, plain = fit_probe(make_trainer, False)
    for cache in (True, str(tmp_path / "features")):
        cached, module = fit_probe(make_trainer, cache)
        assert cached.losses == pytest.approx(uncached.losses, rel=2e-3)  # float16
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=2e-3, atol=2e-3)
        assert cached.images == 2 * TRAINING_IMAGES
    assert uncached.images == 5 * 5 * 200
    assert uncached.losses[-1] < uncached.losses[0]


def test_a_folder_of_features_is_reused_for_another_head(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = str(tmp_path / "features")
    first, first_module = fit_probe(make_trainer, folder)
    second, second_module = fit_probe(make_trainer, folder, seed=1)
    assert (first.images, second.images) == (2 * TRAINING_IMAGES, 0)
    assert not torch.equal(
        first_module.network.get_parameter("fc.weight"), second_module.network.get_parameter("fc.weight")
    )


def test_features_of_other_weights_are_refused(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = str(tmp_path / "features")
    fit_probe(make_trainer, folder, epochs=1)
    network = ResNet([1, 1], [4, 8], in_channels=1)
    trainer = make_trainer(callbacks=[FreezeLayers()], limit_val_batches=0)
    with pytest.raises(ValueError, match=r"different: network\)"):
        trainer.fit(TeacherModule(network, feature_cache=folder), DigitsDataModule(batch_size=200, views=2))


def test_features_that_cannot_be_cached_are_refused(make_trainer: Trainers, small: Networks) -> None:
    data = DigitsDataModule(batch_size=200, views=2)
    with pytest.raises(ValueError, match=r"Features change while 'conv1.weight' trains; add the callback FreezeLayers"):
        make_trainer().fit(TeacherModule(small(), feature_cache=True), data)
    with pytest.raises(ValueError, match="Features cannot be cached: each epoch has new views; set views=V"):
        fit_probe(make_trainer, True, views=None)
    layers = [name for name, _ in small().named_parameters() if not name.startswith("layer2")]
    trainer = make_trainer(callbacks=[FreezeLayers(layers)])
    with pytest.raises(ValueError, match="Features change while 'layer2"):
        trainer.fit(TeacherModule(small(), feature_cache=True), data)


class ScaledLogits(nn.Module):
    """Its logits are not the output of its last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.fc(images.flatten(1))


def test_a_network_whose_last_linear_layer_does_not_return_the_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="The output of ScaledLogits is not that of its last linear layer 'fc'"):
        FeatureCache(ScaledLogits(), torch.randn(4, 1, 8, 8))
    with pytest.raises(ValueError, match="Flatten does not have one linear layer that computes the logits"):
        FeatureCache(nn.Flatten(), torch.randn(4, 1, 8, 8))


def test_an_interrupted_run_resumes_to_identical_weights(make_trainer: Trainers, tmp_path: Path) -> None:
    def run(path: Path | None, callbacks: list[pl.Callback]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = TeacherModule(ResNet([1, 1], [4, 8], in_channels=1), feature_cache=True)
        trainer = make_trainer(max_epochs=3, callbacks=[FreezeLayers(), *callbacks], limit_val_batches=0)
        trainer.fit(module, DigitsDataModule(batch_size=200, views=2), ckpt_path=path)
        return module.state_dict()

    expected = run(None, [SaveAfterEachBatch(tmp_path)])
    for name, value in run(tmp_path / "8.ckpt", []).items():
        assert torch.equal(value, expected[name]), name
