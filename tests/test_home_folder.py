"""Paths that begin with ~ mean the home folder, in Python and in YAML, where no shell expands them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from kd_lightning import (
    Checkpoint,
    CIFAR10DataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    Run,
    SVHNDataModule,
    USPSDataModule,
)
from kd_lightning.callbacks import FeatureWriter, PredictionWriter
from kd_lightning.cli.arguments import expand_arguments
from kd_lightning.export import OnnxClassifier
from kd_lightning.networks import ResNet, from_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", str(folder))
    for name in ("train/cat", "train/dog", "predict"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    "kind", [ImageFolderDataModule, CIFAR10DataModule, MNISTDataModule, SVHNDataModule, USPSDataModule]
)
def test_the_root_of_data(home: Path, kind: type) -> None:
    assert str(kind("~/images").root) == str(home / "images")


def test_files_of_weights(home: Path) -> None:
    network = nn.Linear(2, 3)
    torch.save(network.state_dict(), home / "a.pt")
    filled = from_checkpoint(nn.Linear(2, 3), "~/a.pt")
    assert torch.equal(filled.weight, network.weight)  # type: ignore[arg-type]
    assert Checkpoint("~/a.pt").path == home / "a.pt"


def test_written_files(home: Path) -> None:
    (home / "a.csv").touch()
    for writer in (PredictionWriter("~/a.csv"), FeatureWriter(["fc"], "~/a.csv")):
        assert writer.path == home / "a.csv"


def test_a_command(home: Path, kd: Callable[..., str]) -> None:
    torch.save(ResNet([1], [4], num_classes=2).state_dict(), home / "teacher.pt")
    network = "--model.network=kd_lightning.networks.from_checkpoint"
    inner = ["--model.network.network=kd_lightning.networks.ResNet", "--model.network.network.blocks=[1]"]
    options = [*inner, "--model.network.network.widths=[4]", "--model.network.network.num_classes=2"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    data = ["--data=ImageFolderDataModule", "--data.root=~/images"]
    where = ["--predictions.path=~/labels.csv", "--trainer.logger.save_dir=~/logs"]
    kd(
        "predict",
        "--model=TeacherModule",
        network,
        "--model.network.path=~/teacher.pt",
        *options,
        *quiet,
        *data,
        *where,
    )
    assert len((home / "labels.csv").read_text().splitlines()) == 11
    assert not Path("~").exists()


@pytest.mark.parametrize("flags", [["-c=~/a.yaml"], ["--config=~/a.yaml"], ["-c", "~/a.yaml"]])
def test_a_configuration(flags: list[str], home: Path) -> None:
    (home / "a.yaml").write_text("trainer: {max_epochs: 1}")
    assert list(expand_arguments(["fit", *flags])) == ["fit", "-c", str(home / "a.yaml")]
    (home / "run").mkdir()
    (home / "run" / "config.yaml").write_text("trainer: {max_epochs: 1}")
    flags = [flag.replace("a.yaml", "run") for flag in flags]
    assert list(expand_arguments(["test", *flags])) == ["test", "-c", str(home / "run" / "config.yaml")]


def test_a_teacher(home: Path) -> None:
    (home / "a.yaml").write_text("trainer: {max_epochs: 1}")
    words = list(expand_arguments(["fit", "-c=~/a.yaml", "--teacher=~/a.ckpt"]))
    assert words[-1] == f"--model.teacher.path={home / 'a.ckpt'}"


def test_an_exported_file(home: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^There is no file '{home / 'none.onnx'}'"):
        OnnxClassifier("~/none.onnx")


def test_a_run(home: Path) -> None:
    (home / "run" / "checkpoints").mkdir(parents=True)
    assert Run.find("~/run").folder == home / "run"
