"""Weights and data sets that cannot be downloaded: the sentence names the file and the folder to put it into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
from command_options import QUIET
from made_photographs import write_photographs
from torchvision.models import ResNet50_Weights

from kd_lightning.cli.download_errors import explain_download_error

FILE = ResNet50_Weights.DEFAULT.url.rpartition("/")[2]
FIT = ["fit", "-c", "photos/finetune", "--data.root=images", *QUIET]


def unreachable(*arguments: Any, **options: Any) -> None:
    raise URLError("Name or service not known")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torch keeps downloads, where nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    write_photographs(tmp_path / "images", ["ants", "bees"])
    return tmp_path / "torch/hub/checkpoints"


def test_a_file_of_torchvision_is_named_with_its_folder(kd: Callable[..., str], folder: Path) -> None:
    with pytest.raises(SystemExit) as error:
        kd(*FIT)
    assert str(error.value) == (
        f"kd-lightning fit: {ResNet50_Weights.DEFAULT.url} cannot be downloaded (Name or service not known); get "
        f"{FILE} by other means and put it into {folder}."
    )


def test_a_file_of_a_data_set_is_named_with_its_folder(
    kd: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    data = ["--data=DatasetDataModule", "--data.train=torchvision.datasets.SVHN", "--data.train.root=numbers"]
    model = ["--model=TeacherModule", "--model.network=kd_lightning.networks.resnet20"]
    with pytest.raises(
        SystemExit,
        match=r"train_32x32\.mat cannot be downloaded \(Name .*\); get train_32x32\.mat by .* into numbers\.$",
    ):
        kd("fit", *model, *data, "--data.train.download=true", *QUIET)


def test_a_damaged_file_of_torchvision_is_named(kd: Callable[..., str], folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / FILE).write_text("x")
    with pytest.raises(
        SystemExit, match=rf"fit: .*{FILE} is damaged \(.*\); delete it, so that it is downloaded again"
    ):
        kd(*FIT)


def test_the_weights_of_timm_are_named_with_the_folder_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError) as error:  # noqa: PT011
        timm.create_model("resnet10t", pretrained=True, cache_dir=str(tmp_path))
    sentence = str(explain_download_error(error.value))
    assert sentence.startswith("The weights of timm/resnet10t.c3_in1k cannot be downloaded from huggingface.co (")
    assert f"; copy {tmp_path}/models--timm--resnet10t.c3_in1k from a machine that has it, or get " in sentence
    assert sentence.endswith("set pretrained_cfg_overlay.file in the network's dict_kwargs to its path.")


def test_other_errors_are_not_explained() -> None:
    assert explain_download_error(URLError("Name or service not known")) is None
