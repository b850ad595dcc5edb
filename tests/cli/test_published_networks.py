"""Networks with published weights on the command line: their input and classes are known without being typed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_options import QUIET
from made_photographs import write_photographs
from mostly_slow import mostly_slow
from torch import nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, resnet18, resnet50

from kd_lightning.cli.lightning_cli import CommandLine
from kd_lightning.export import OnnxClassifier
from kd_lightning.files.prepare import Preparation
from kd_lightning.networks import DataConfig, data_config, torchvision_config

Command = Callable[..., str]
PUBLISHED = ResNet18_Weights.DEFAULT
FILE = PUBLISHED.url.rpartition("/")[2]
TEACHER = ["--model=kd_lightning.TeacherModule", "--data=kd_lightning.ImageFolderDataModule", "--data.root=photos"]
STUDENT = [
    "--model=kd_lightning.DistillationModule",
    "--model.student=kd_lightning.networks.resnet20",
    *TEACHER[1:],
]
RESNET = "torchvision.models.resnet18"
QUICK = [*QUIET, "--trainer.max_epochs=1", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights where torchvision keeps downloads; nothing else can be downloaded."""
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(resnet18().state_dict(), folder / FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", _refuse)
    return folder / FILE


def _refuse(*arguments: Any, **options: Any) -> None:
    raise ConnectionError("there is no network")


def built(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The module that a command builds."""
    monkeypatch.setattr("sys.argv", ["kd-lightning", *arguments])
    return CommandLine(run=False).model


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_weights_of_torchvision_that_a_configuration_names(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = built(monkeypatch, *TEACHER, f"--model.network={RESNET}", f"--model.network.weights={weights}")
    assert data_config(plain.network) == torchvision_config(PUBLISHED)
    network = ["--model.network=kd_lightning.networks.replace_head", "--model.network.num_classes=2"]
    inner = [f"--model.network.network={RESNET}", f"--model.network.network.weights={weights}"]
    around = built(monkeypatch, *TEACHER, *network, *inner)
    assert data_config(around.network) == torchvision_config(PUBLISHED)._replace(classes=None)
    teacher = built(monkeypatch, *STUDENT, f"--model.teacher={RESNET}", f"--model.teacher.weights={weights}")
    assert data_config(teacher.teacher) == torchvision_config(PUBLISHED)
    assert data_config(teacher.student) == DataConfig()


def test_random_weights_have_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_config(built(monkeypatch, *TEACHER, f"--model.network={RESNET}").network) == DataConfig()


def test_a_published_file_is_known_by_its_name(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ["--model.teacher=kd_lightning.networks.from_checkpoint", f"--model.teacher.network={RESNET}"]
    teacher = built(monkeypatch, *STUDENT, *loaded, f"--model.teacher.path={published}").teacher
    assert data_config(teacher) == torchvision_config(PUBLISHED)
    # the weights that the file replaces say nothing about it
    own = published.rename(published.with_name("own.pth"))
    torch.save(torch.load(own, weights_only=True), published)
    loaded.append("--model.teacher.network.weights=DEFAULT")
    teacher = built(monkeypatch, *STUDENT, *loaded, f"--model.teacher.path={own}").teacher
    assert data_config(teacher) == DataConfig()
    statistics = ["--model.teacher.mean=[0.5,0.5,0.5]", "--model.teacher.std=[0.2,0.2,0.2]"]
    teacher = built(monkeypatch, *STUDENT, *loaded, f"--model.teacher.path={own}", *statistics).teacher
    assert data_config(teacher) == DataConfig.of([0.5] * 3, [0.2] * 3)


def test_fit_test_export_and_classify_without_a_size(kd: Command, published: Path, tmp_path: Path) -> None:
    """The size, the crop and the statistics are those of the weights, also where these do not exist any more."""
    write_photographs(tmp_path / "photos", ["ants", "bees"])
    network = ["--model.network=kd_lightning.networks.replace_head", "--model.network.num_classes=2"]
    inner = [f"--model.network.network={RESNET}", "--model.network.network.weights=DEFAULT"]
    kd("fit", *TEACHER, *network, *inner, *QUICK, "--data.batch_size=8", "--trainer.limit_train_batches=1")
    checkpoint = tmp_path / "lightning_logs/version_0/checkpoints/best.ckpt"
    known = torchvision_config(PUBLISHED)._replace(classes=("ants", "bees"))
    assert torch.load(checkpoint, weights_only=True)["data_config"] == known.as_plain()
    published.unlink()
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    kd("test", "--ckpt_path", str(checkpoint), "--data.root=elsewhere", *QUIET)
    kd("test", "-c", "lightning_logs/version_0", "--data.root=elsewhere", *QUIET)
    kd("export", str(checkpoint))
    assert OnnxClassifier(checkpoint.with_suffix(".onnx")).preparation == known.preparation
    table = kd("classify", str(checkpoint.with_suffix(".onnx")), "elsewhere/ants/0.jpg")
    assert table.split()[1] in ("ants", "bees")


@pytest.mark.parametrize("recipe", mostly_slow(["finetune", "probe"], "finetune"))
def test_recipes_from_published_weights_use_their_size_and_random_crops(
    kd: Command, tmp_path: Path, recipe: str
) -> None:
    write_photographs(tmp_path / "photos", ["ants", "bees"])
    limits = ["--data.batch_size=8", "--trainer.limit_train_batches=1"]
    network = "--model.network=torchvision/resnet18@pretrained"
    kd("fit", "-c", f"photos/{recipe}", "--data.root=photos", network, *QUICK, *limits)
    (checkpoint,) = (tmp_path / "lightning_logs").rglob("best.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["data_config"]["preparation"] == torchvision_config(PUBLISHED).as_plain()["preparation"]
    assert saved["datamodule_hyper_parameters"]["augmentation"]["preset"] == "standard"
    assert saved["hyper_parameters"]["network"]["init_args"]["num_classes"] == 2


def test_layers_are_listed_for_the_size_of_the_weights(kd: Command, tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", ["ants", "bees"])
    printed = kd("layers", *TEACHER, f"--model.network={RESNET}", "--model.network.weights=DEFAULT")
    assert ["layer1", "(64, 56, 56)"] in [line.split(maxsplit=1) for line in printed.splitlines()]


def test_layers_of_a_recipe_are_listed_before_anything_is_downloaded(
    kd: Command, published: Path, tmp_path: Path
) -> None:
    published.unlink()
    write_photographs(tmp_path / "photos", ["ants", "bees"])
    printed = kd(
        "layers", "-c", "photos/fitnets", "--data.root=photos", "--model.teacher=torchvision/resnet18@pretrained"
    )
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert lines.count(["layer2", "(128, 28, 28)"]) == 2, "student and teacher, at 224 pixels"
    assert lines.count(["fc", "(2,)"]) == 2


def test_a_student_follows_a_teacher_of_timm(kd: Command, tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", ["ants", "bees"])
    network: nn.Module = timm.create_model("resnet10t", num_classes=2)
    network.train()(torch.rand(4, 3, 32, 32))
    torch.save(network.state_dict(), "teacher.pth")
    of_timm = ["--model.teacher.network=timm.create_model", "--model.teacher.network.model_name=resnet10t"]
    loaded = ["--model.teacher=kd_lightning.networks.from_checkpoint", "--model.teacher.path=teacher.pth"]
    sizes = ["--data.image_size=32", "--data.batch_size=8", "--model.student.num_classes=2"]
    of_timm.append("--model.teacher.network.dict_kwargs.num_classes=2")
    kd("fit", *STUDENT, *loaded, *of_timm, *sizes, *QUICK, "--model.teacher_check=off")
    saved = torch.load("lightning_logs/version_0/checkpoints/best.ckpt", weights_only=True)
    kept = DataConfig.of(**saved["data_config"])
    assert kept[:3] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("ants", "bees"))
    assert kept.preparation == Preparation.of(224, 235, interpolation="bicubic", fill=(124, 116, 104)).at(32)


@pytest.mark.slow
def test_two_commands_without_a_further_flag(kd: Command, published: Path, tmp_path: Path) -> None:
    """A teacher and a student from published weights, whose files lie where torchvision keeps downloads."""
    weights = ResNet50_Weights.IMAGENET1K_V2
    torch.save(resnet50().state_dict(), published.with_name(weights.url.rpartition("/")[2]))
    write_photographs(tmp_path / "my_images", ["ants", "bees", "wasps"])
    for recipe in ("photos/finetune", "photos/distill"):
        limits = ["--trainer.limit_train_batches=1", "--trainer.max_epochs=1", "--model.teacher_check=off"]
        kd("fit", "-c", recipe, "--data.root=my_images", *QUIET, *limits[: 2 if recipe == "photos/finetune" else 3])
    student = torch.load("lightning_logs/photos/distill/version_0/checkpoints/best.ckpt", weights_only=True)
    known = torchvision_config(PUBLISHED)._replace(classes=("ants", "bees", "wasps"))
    assert DataConfig.of(**student["data_config"]) == known
    assert student["state_dict"]["network.fc.weight"].shape == (3, 512)
    teacher = student["hyper_parameters"]["teacher"]["init_args"]
    assert teacher["path"] == "lightning_logs/photos/finetune/version_0/checkpoints/best.ckpt"
    assert teacher["network"]["init_args"]["network"]["dict_kwargs"] == {"weights": None}
    kd("export", "photos/distill", "-o", "student.onnx")
    published.unlink()
    assert "accuracy" in kd("test", "-c", "photos/distill", *QUIET)
    printed = kd("classify", "student.onnx", "my_images")
    assert {line.split()[1] for line in printed.splitlines()} <= {"ants", "bees", "wasps"}
