"""Outputs of layers are written to a NumPy file."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import FeatureWriter
from kd_lightning.data.image_set import ImageSet
from kd_lightning.errors import UserError
from kd_lightning.networks import DataConfig, ResNet, set_data_config

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


@pytest.mark.parametrize(("split", "count"), [("predict", 360), ("test", 360), ("train", 1150), ("val", 287)])
def test_the_file_holds_the_layers_outputs_of_each_image(
    small: Networks, make_trainer: Trainers, tmp_path: Path, split: str, count: int
) -> None:
    network, data = small(), DigitsDataModule(batch_size=100)
    set_data_config(network, DataConfig.of((0.5,), (0.2,)))
    path = tmp_path / "folder" / "features.npz"
    writer = FeatureWriter(["avgpool", "layer1"], str(path), split)  # type: ignore[arg-type]
    make_trainer(callbacks=[writer]).predict(TeacherModule(network), data)
    assert writer.written == path
    with np.load(path) as file:  # without pickle
        found = dict(file)
    assert found["labels"].shape == found["ids"].shape == (count,)
    assert (np.diff(found["ids"]) > 0).all()
    stored = data.splits["train" if split in ("train", "val") else split]
    assert (found["labels"] == stored.labels[found["ids"]].numpy()).all()
    assert isinstance(stored, ImageSet)
    images = (stored.pixels[found["ids"]].float() / 255 - 0.5) / 0.2  # normalized for the network, and not augmented
    with torch.no_grad():
        maps = network.eval().bn1(network.conv1(images)).relu()
        for layer in ("layer1", "layer2", "avgpool"):
            maps = network.get_submodule(layer)(maps)
        np.testing.assert_allclose(found["logits"], network(images), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["avgpool"], maps, rtol=1e-3, atol=1e-4)
    assert found["layer1"].shape == (count, 4, 8, 8)


def test_nothing_is_written_without_layers(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    make_trainer(callbacks=[FeatureWriter()]).predict(TeacherModule(small()), digits)
    assert not list(tmp_path.rglob("*.npz"))


def test_an_existing_file_and_an_unknown_layer_are_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    place = tmp_path / "mine.npz"
    place.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; name another file for the features"):
        make_trainer(callbacks=[FeatureWriter(["fc"], str(place))]).predict(TeacherModule(small()), digits)
    assert place.read_text() == "mine"
    with pytest.raises(ValueError, match="ResNet has no layer 'nope'"):
        make_trainer(callbacks=[FeatureWriter(["nope"])]).predict(TeacherModule(small()), digits)


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_two_processes_write_the_same_as_one(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    module, paths = TeacherModule(small()), [tmp_path / "one.npz", tmp_path / "two.npz"]
    for path, options in zip(paths, ({}, {"strategy": "ddp_fork", "devices": 2}), strict=True):
        trainer = make_trainer(callbacks=[FeatureWriter(["avgpool"], str(path))], **options)
        trainer.predict(module, DigitsDataModule(batch_size=77), return_predictions=False)
    with np.load(paths[0]) as one, np.load(paths[1]) as two:
        assert set(one) == set(two) == {"avgpool", "logits", "labels", "ids"}
        assert len(one["ids"]) == 360
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_a_split_of_a_plain_loader_is_refused(small: Networks, make_trainer: Trainers) -> None:
    trainer = make_trainer(callbacks=[FeatureWriter(["avgpool"], split="train")])
    with pytest.raises(UserError, match="can choose the split 'train' in data modules of kd_lightning only"):
        trainer.predict(TeacherModule(small()), DataLoader(torch.rand(4, 1, 8, 8), batch_size=2))  # type: ignore[arg-type]
