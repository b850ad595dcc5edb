"""A checkpoint is read once, describes its run, and rebuilds its network."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from kd_lightning import Checkpoint, DigitsDataModule, TeacherModule
from kd_lightning.networks import DataConfig, data_config, from_checkpoint

Networks = Callable[..., nn.Module]
Trainers = Callable[..., pl.Trainer]
OLD: list[dict[str, Any]] = [
    {"trained_on": {"mean": [0.5], "std": [0.5], "classes": None}},
    {"data_config": {"mean": [0.5], "std": [0.5], "classes": None}},
    {"narrowed": {"fc.weight": [2, 2]}},
]


@pytest.fixture
def saved(small: Networks, make_trainer: Trainers, digits: DigitsDataModule, tmp_path: Path) -> Path:
    """The checkpoint of a module that was trained from Python."""
    trainer = make_trainer(max_steps=2)
    trainer.fit(TeacherModule(small(), learning_rate=0.3), digits)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def set_hyper_parameters(path: Path, **hyper_parameters: Any) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], **hyper_parameters}}, path)


def test_attributes_of_a_runs_checkpoint(saved: Path, digits: DigitsDataModule) -> None:
    checkpoint = Checkpoint(saved)
    assert checkpoint.is_run
    assert checkpoint.global_step == 2
    assert checkpoint.data_config == DataConfig.of(digits.mean, digits.std, digits.classes)
    assert checkpoint.sliced_shapes is None
    assert all(key.startswith("network.") for key in checkpoint.state_dict)
    assert checkpoint.hyper_parameters["learning_rate"] == 0.3
    assert checkpoint.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert checkpoint.content["kd_lightning_format"] == 1
    assert repr(checkpoint) == f"Checkpoint({str(saved)!r})"


def test_a_file_of_weights_is_not_a_runs_checkpoint(small: Networks, tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "weights.pt")
    checkpoint = Checkpoint(tmp_path / "weights.pt")
    assert not checkpoint.is_run
    assert checkpoint.data_config == DataConfig()
    with pytest.raises(ValueError, match=r"weights\.pt' does not describe how its network is built, as checkpoints of"):
        checkpoint.network()
    with pytest.raises(ValueError, match=r"weights\.pt' is not a checkpoint of a run; to use the weights in it, fill"):
        Checkpoint.of_run(tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint 'absent\.ckpt'"):
        Checkpoint("absent.ckpt")


def test_a_file_is_read_once(saved: Path, small: Networks, loaded_files: list[Path]) -> None:
    checkpoint = Checkpoint(saved)
    loaded = TeacherModule.load_from_checkpoint(checkpoint, network=small())
    assert loaded_files == [saved]
    assert data_config(loaded.network) == checkpoint.data_config
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, checkpoint.state_dict[name])


def test_the_network_is_rebuilt_from_hyper_parameters(saved: Path, small: Networks) -> None:
    import lightning.pytorch.cli  # noqa: F401 - as after any run of the command line

    instantiator = "lightning.pytorch.cli.instantiate_module"
    network = {"class_path": "torch.nn.Flatten"}
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "state_dict": {}}, saved)
    set_hyper_parameters(saved, _instantiator=instantiator, _class_path="kd_lightning.TeacherModule", network=network)
    checkpoint = Checkpoint(saved)
    rebuilt = checkpoint.network()
    assert isinstance(rebuilt, nn.Flatten)
    assert not rebuilt.training
    assert data_config(rebuilt) == checkpoint.data_config


@pytest.mark.parametrize("name", ["torch.nn.Linear", "torch.absent", "kd_lightning", "torch.nn", 3, None])
def test_other_classes_in_the_hyper_parameters_are_refused(saved: Path, name: Any) -> None:
    set_hyper_parameters(saved, _class_path=name)
    with pytest.raises(ValueError, match="does not describe how its network is built"):
        Checkpoint(saved).network()


@pytest.mark.parametrize("keys", OLD)
def test_a_checkpoint_of_another_version_is_refused(saved: Path, small: Networks, keys: dict[str, Any]) -> None:
    content = torch.load(saved, weights_only=True)
    plain = {key: value for key, value in content.items() if key not in ("kd_lightning_format", "data_config")}
    message = r"a\.ckpt' was written by another version of kd_lightning \(its format is "
    for old, number in (({**plain, **keys}, None), ({**content, "kd_lightning_format": 2}, 2)):
        torch.save(old, saved)
        for read in (Checkpoint, lambda path: from_checkpoint(small(), path)):
            with pytest.raises(ValueError, match=rf"{message}{number} and not 1\); train again with this version"):
                read(saved)


def test_weights_of_another_packages_checkpoint_are_loaded(saved: Path, small: Networks) -> None:
    content = torch.load(saved, weights_only=True)
    plain = {key: value for key, value in content.items() if key not in ("kd_lightning_format", "data_config")}
    torch.save(plain, saved)
    assert not Checkpoint(saved).is_run
    assert from_checkpoint(small(), saved).state_dict().keys() == small().state_dict().keys()
