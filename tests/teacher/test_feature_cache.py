"""A network of which the head alone trains is asked once about each view of an image, and learns the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import FreezeLayers
from kd_lightning.networks import DataConfig, ResNet, set_data_config
from kd_lightning.teacher.feature_cache import FeatureCache

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]
TRAINING_IMAGES = 1150


class Watch(pl.Callback):
    """Counts the training images that the frozen part sees, and keeps the losses."""

    def __init__(self) -> None:
        self.asked = 0
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.asked += len(output) if trainer.training and len(output) > 4 else 0  # but for what it is tried on

        pl_module.network.conv1.register_forward_hook(count)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def probe(
    make_trainer: Trainers, cache: bool | str, seed: int = 0, epochs: int = 5, views: int | None = 2, **options: Any
) -> tuple[Watch, TeacherModule]:
    torch.manual_seed(seed)
    network = ResNet([1, 1], [4, 8], in_channels=1)
    torch.manual_seed(3)
    for name, weight in network.named_parameters():
        if not name.startswith("fc."):
            nn.init.normal_(weight, std=0.5)
    network(torch.randn(64, 1, 8, 8))  # batch norms that have seen images
    set_data_config(network, DataConfig.of((0.5,), (0.2,)))
    watch, module = Watch(), TeacherModule(network, feature_cache=cache, learning_rate=0.01)
    trainer = make_trainer(max_epochs=epochs, callbacks=[FreezeLayers(), watch], limit_val_batches=0, **options)
    trainer.fit(module, DigitsDataModule(batch_size=200, views=views))
    return watch, module


def test_a_cached_probe_is_the_probe(make_trainer: Trainers, tmp_path: Path) -> None:
    online, plain = probe(make_trainer, False)
    for where in (True, str(tmp_path / "features")):
        cached, module = probe(make_trainer, where)
        assert cached.losses == pytest.approx(online.losses, rel=2e-3)  # float16
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=2e-3, atol=2e-3)
        assert cached.asked == 2 * TRAINING_IMAGES
    assert online.asked == 5 * 5 * 200
    assert online.losses[-1] < online.losses[0]


def test_a_folder_serves_another_head(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = str(tmp_path / "features")
    first, one = probe(make_trainer, folder)
    second, other = probe(make_trainer, folder, seed=1)
    assert (first.asked, second.asked) == (2 * TRAINING_IMAGES, 0)
    assert not torch.equal(one.network.get_parameter("fc.weight"), other.network.get_parameter("fc.weight"))


def test_features_of_other_weights_are_refused(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = str(tmp_path / "features")
    probe(make_trainer, folder, epochs=1)
    network = ResNet([1, 1], [4, 8], in_channels=1)
    trainer = make_trainer(callbacks=[FreezeLayers()], limit_val_batches=0)
    with pytest.raises(ValueError, match=r"different: network\)"):
        trainer.fit(TeacherModule(network, feature_cache=folder), DigitsDataModule(batch_size=200, views=2))


def test_what_cannot_be_cached_is_refused(make_trainer: Trainers, small: Networks) -> None:
    data = DigitsDataModule(batch_size=200, views=2)
    with pytest.raises(ValueError, match=r"Features change while 'conv1.weight' trains; add the callback FreezeLayers"):
        make_trainer().fit(TeacherModule(small(), feature_cache=True), data)
    with pytest.raises(ValueError, match="Features cannot be cached: each epoch has new views; set views=V"):
        probe(make_trainer, True, views=None)
    layers = [name for name, _ in small().named_parameters() if not name.startswith("layer2")]
    trainer = make_trainer(callbacks=[FreezeLayers(layers)])
    with pytest.raises(ValueError, match="Features change while 'layer2"):
        trainer.fit(TeacherModule(small(), feature_cache=True), data)


class Twice(nn.Module):
    """Its last linear layer does not make the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.fc(images.flatten(1))


def test_a_network_whose_last_layer_does_not_make_the_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="The output of Twice is not that of its last linear layer 'fc'"):
        FeatureCache(Twice(), torch.randn(4, 1, 8, 8))
    with pytest.raises(ValueError, match="Flatten does not have one linear layer that computes the logits"):
        FeatureCache(nn.Flatten(), torch.randn(4, 1, 8, 8))


def test_a_probe_goes_on_to_the_same_bits(make_trainer: Trainers, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def run(path: Path | None, callbacks: list[pl.Callback]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = TeacherModule(ResNet([1, 1], [4, 8], in_channels=1), feature_cache=True)
        trainer = make_trainer(max_epochs=3, callbacks=[FreezeLayers(), *callbacks], limit_val_batches=0)
        trainer.fit(module, DigitsDataModule(batch_size=200, views=2), ckpt_path=path)
        return module.state_dict()

    whole = run(None, [Save()])
    for name, value in run(tmp_path / "cut.ckpt", []).items():
        assert torch.equal(value, whole[name]), name
