"""Networks that flags and YAML files name shortly: the configuration is complete, and the classes are the data's."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_options import QUIET
from jsonargparse import ArgumentParser
from made_photographs import write_photographs

from kd_lightning.cli.arguments import expand_arguments
from kd_lightning.cli.class_count import count_classes
from kd_lightning.cli.network_arguments import write_networks
from kd_lightning.errors import UserError
from kd_lightning.files.format import FORMAT, KEY
from kd_lightning.modules.classification import ClassificationModule

Command = Callable[..., str]
CLASSES = ["ants", "bees", "wasps"]
DATA = ["--data=ImageFolderDataModule", "--data.root=images"]
STUDENT = ["--model=DistillationModule", "--model.student=torchvision/resnet18", *DATA]
QUICK = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
QUICK += ["--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1", "--data.image_size=32"]
QUICK += ["--data.batch_size=4", "--model.teacher_check=off"]
OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int = 10, width: int = 4):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, num_classes)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))

def build(num_classes: int) -> nn.Module:
    return Net(num_classes)

def fixed() -> nn.Module:
    return Net(3)
"""


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    (tmp_path / "own_nets.py").write_text(OWN)
    return write_photographs(tmp_path / "images", CLASSES, count=8)


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The arguments of the module that a command's arguments configure."""
    monkeypatch.chdir(tmp_path)

    def configure(*arguments: str) -> Any:
        words = list(expand_arguments(["fit", *arguments]))
        written = write_networks(words, partial(count_classes, words))
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("-c", action="config")
        parser.add_subclass_arguments(ClassificationModule, "model")
        chosen: list[str] = []
        for flag, value in zip(written, [*written[1:], ""], strict=True):
            if flag == "-c":
                content = yaml.safe_load(value if "\n" in value else Path(value).read_text())
                chosen += ["-c", yaml.safe_dump({"model": content["model"]})] if "model" in content else []
            elif flag.startswith("--model"):
                chosen.append(flag)
        return parser.parse_args(chosen).as_dict()["model"]["init_args"]

    return configure


def test_arguments_without_such_names_stay_as_they_are() -> None:
    words = ["fit", "-c", "model: {class_path: a.B}\n", "--model.temperature", "2", "--data.root=timm/data"]
    words += ["--model.teacher.path=timm/resnet10t", "--trainer.max_epochs=3", "--model.teacher_cache=timm/logits"]

    def refuse() -> int:
        raise AssertionError("the data are read")

    assert write_networks(words, refuse) == words


@pytest.mark.parametrize("words", [["=timm/resnet10t"], [".class_path=timm/resnet10t"], [" timm/resnet10t"]])
def test_a_flag_becomes_a_class_with_the_classes_of_the_data(words: list[str], configured: Callable[..., Any]) -> None:
    flag = [part for part in f"--model.network{words[0]}".split(" ") if part]
    node = configured("--model=TeacherModule", *flag, *DATA)["network"]
    assert node["class_path"] == "timm.create_model"
    assert (node["init_args"]["model_name"], node["init_args"]["pretrained"]) == ("resnet10t", False)
    assert node["dict_kwargs"] == {"num_classes": 3}


def test_a_yaml_file_says_the_same(configured: Callable[..., Any]) -> None:
    network: Any = "timm/resnet10t"
    for described in (network, {"class_path": network}, {"class_path": network, "dict_kwargs": {"drop_rate": 0.1}}):
        content = {"class_path": "TeacherModule", "init_args": {"network": described, "learning_rate": 0.5}}
        Path("own.yaml").write_text(yaml.safe_dump({"model": content, "data": {"class_path": "ImageFolderDataModule"}}))
        arguments = configured("-c", "own.yaml", "--data.root=images")
        further = described.get("dict_kwargs", {}) if isinstance(described, dict) else {}
        assert arguments["network"]["dict_kwargs"] == {"num_classes": 3, **further}
        assert arguments["learning_rate"] == 0.5


def test_arguments_of_the_network_are_further_flags(configured: Callable[..., Any]) -> None:
    drop = "--model.network.dict_kwargs.drop_rate=0.2"
    node = configured("--model=TeacherModule", "--model.network=timm/resnet10t", drop, *DATA)["network"]
    assert node["dict_kwargs"] == {"num_classes": 3, "drop_rate": 0.2}


def test_networks_inside_others_are_written_out(configured: Callable[..., Any]) -> None:
    node = configured(*STUDENT, "--model.teacher=kd_lightning.networks.EnsembleTeacher",
                      "--model.teacher.networks=[timm/resnet10t, torchvision/resnet18]")["teacher"]  # fmt: skip
    assert [inner["dict_kwargs"] for inner in node["init_args"]["networks"]] == [{"num_classes": 3}] * 2
    head = ["--model.network=kd_lightning.networks.replace_head", "--model.network.num_classes=3"]
    inner = "--model.network.network=torchvision/resnet18@pretrained"
    node = configured("--model=TeacherModule", *head, inner, *DATA)["network"]
    assert node["init_args"]["network"]["dict_kwargs"] == {"weights": "IMAGENET1K_V1"}


@pytest.mark.parametrize("way", ["flags", "the class again", "json", "yaml"])
def test_a_network_inside_another_keeps_nothing_where_its_class_changes(
    way: str, configured: Callable[..., Any], tmp_path: Path
) -> None:
    """The network of photos/finetune is a new head on one of torchvision, whose published weights are an argument."""
    timm = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet10t"}}
    inner = {
        "class_path": "kd_lightning.networks.from_checkpoint",
        "init_args": {"path": "four.ckpt", "network": {**timm, "dict_kwargs": {"num_classes": 4}}},
    }
    whole = {"class_path": "kd_lightning.networks.replace_head", "init_args": {"num_classes": 3, "network": inner}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"network": whole}}}))
    place = "--model.network.network"
    flags = [f"{place}={inner['class_path']}", f"{place}.path=four.ckpt", f"{place}.network=timm/resnet10t"]
    flags.append(f"{place}.network.dict_kwargs.num_classes=4")
    words = {
        "flags": flags,
        "the class again": ["--model.network=kd_lightning.networks.replace_head", *flags],
        "json": [f"--model.network={json.dumps(whole)}"],
        "yaml": ["-c", "own.yaml"],
    }
    arguments = configured("-c", "photos/finetune", *words[way], *DATA)
    node = arguments["network"]["init_args"]
    assert node["num_classes"] == 3
    assert not node["network"].get("dict_kwargs")
    assert node["network"]["init_args"]["path"] == "four.ckpt"
    assert node["network"]["init_args"]["network"]["dict_kwargs"] == {"num_classes": 4}
    assert arguments["layer_decay"] == 0.7, "of the recipe"


def test_further_arguments_of_a_network_inside_another_are_added(configured: Callable[..., Any]) -> None:
    flag = "--model.network.network.dict_kwargs.progress=false"
    node = configured("-c", "photos/finetune", flag, *DATA)["network"]["init_args"]["network"]
    assert node["dict_kwargs"] == {"weights": "IMAGENET1K_V2", "progress": False}


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/resnet10t@pretrained", "own_nets.Net", "own_nets.build"])
def test_the_name_of_a_teacher_is_that_of_the_network_in_its_file(name: str, configured: Callable[..., Any]) -> None:
    for arguments in (["-c", "photos/distill", "--data.root=images"], [*STUDENT, "--teacher", "a.pt"]):
        teacher = configured(*arguments, f"--model.teacher={name}")["teacher"]
        assert teacher["class_path"] == "kd_lightning.networks.from_checkpoint"
        assert teacher["init_args"]["path"] == ("photos/finetune" if "-c" in arguments else "a.pt")
        node = teacher["init_args"]["network"]
        assert node["init_args"].get("pretrained", False) is False, "the file has the weights"
        assert {**node["init_args"], **node.get("dict_kwargs", {})}["num_classes"] == 3


def test_a_checkpoint_of_a_run_says_which_network_it_contains(configured: Callable[..., Any]) -> None:
    small = {"class_path": "kd_lightning.networks.ResNet", "init_args": {"blocks": [1], "widths": [8]}}
    hyper_parameters = {"_class_path": "kd_lightning.TeacherModule", "network": small}
    torch.save({KEY: FORMAT, "state_dict": {}, "hyper_parameters": hyper_parameters}, "a.ckpt")
    distill = ["-c", "digits/distill", "--teacher", "a.ckpt"]
    network = configured(*distill)["teacher"]["init_args"]["network"]
    assert (network["init_args"]["blocks"], network["init_args"]["widths"]) == ([1], [8])
    named = configured(*distill, "--model.teacher.network=own_nets.Net")["teacher"]["init_args"]["network"]
    assert named["class_path"] == "own_nets.Net", "what the user names comes first"


def test_so_it_is_in_a_yaml_file(configured: Callable[..., Any]) -> None:
    Path("own.yaml").write_text("model: {init_args: {teacher: timm/resnet10t, student: own_nets.Net}}")
    arguments = configured("-c", "photos/distill", "-c", "own.yaml", "--data.root=images")
    assert arguments["teacher"]["init_args"]["path"] == "photos/finetune"
    assert arguments["teacher"]["init_args"]["network"]["dict_kwargs"] == {"num_classes": 3}
    assert arguments["student"] == {"class_path": "own_nets.Net", "init_args": {"num_classes": 3, "width": 4}}


def test_import_paths_get_the_number_of_classes_where_they_take_it(configured: Callable[..., Any]) -> None:
    module = ["--model=TeacherModule", *DATA]
    for name, expected in (("own_nets.Net", 3), ("own_nets.build", 3), ("kd_lightning.networks.resnet20", 3)):
        assert configured(*module, f"--model.network={name}")["network"]["init_args"]["num_classes"] == expected
    assert configured(*module, "--model.network=own_nets.fixed")["network"] == {"class_path": "own_nets.fixed"}
    given = configured(*module, "--model.network=own_nets.Net", "--model.network.num_classes=7")
    assert given["network"]["init_args"]["num_classes"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.teacher=timm/resnet10t"], "timm/resnet10t has random weights, from which nothing can be learned; "),
        (["--model.teacher=torchvision/resnet18@pretrained"],
         "the weights of torchvision/resnet18@pretrained have 1000 classes and the data 3, so its head would be "),
        (["--model.teacher=timm/resnet10t@pretrained"], "timm/resnet10t@pretrained have 1000 classes and the data 3"),
        (["--model.student=timm/resnet10"], "timm has no network 'resnet10'; near ones are resnet10t"),
        (["--model.student=timm/resnet10t", "--data.root=nowhere"], "There is no folder 'nowhere'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(
    arguments: list[str], message: str, configured: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        configured(*STUDENT, *arguments)


def test_data_that_do_not_exist_are_reported_by_the_command(kd: Command) -> None:
    with pytest.raises(SystemExit, match=r"^kd-lightning fit: There is no folder 'nowhere'; set root to the folder of"):
        kd("fit", *STUDENT, "--data.root=nowhere")
    Path("labels.csv").write_text("file,label\nants/0.jpg,a\nants/99.jpg,b\n")
    with pytest.raises(SystemExit, match=r"^kd-lightning fit: 'labels\.csv' names 1 of 2 files that do not exist: "):
        kd("fit", *STUDENT, "--data.labels=labels.csv")


def test_wrong_arguments_of_the_data_are_reported_by_the_command(kd: Command) -> None:
    with pytest.raises(SystemExit, match=r"^kd-lightning fit: data\.rot is not an argument [^\n]*nearest is root\.$"):
        kd("fit", *STUDENT, "--data.rot=x")


def test_data_without_classes_are_one_sentence(configured: Callable[..., Any], tmp_path: Path) -> None:
    for number, file in enumerate(sorted((tmp_path / "images").rglob("*.jpg"))):
        file.rename(tmp_path / f"images/{number}.jpg")
    for name in CLASSES:
        (tmp_path / "images" / name).rmdir()
    with pytest.raises(UserError, match=r"^The data name no classes, so the number of those of torchvision/resnet18"):
        configured(*STUDENT)


def test_a_student_on_unlabelled_images_has_the_classes_of_its_teacher(
    kd: Command, configured: Callable[..., Any], tmp_path: Path
) -> None:
    quick = [*QUICK[:-1], "--trainer.callbacks=kd_lightning.callbacks.AverageWeights"]
    kd("fit", "-c", "photos/finetune", "--data.root=images", "--model.network=own_nets.Net", *quick)
    (tmp_path / "unlabelled").mkdir()
    (tmp_path / "images/ants/0.jpg").rename(tmp_path / "unlabelled/0.jpg")
    student = configured("-c", "photos/distill", "--data.root=unlabelled")["student"]
    assert student["init_args"]["num_classes"] == 3


def test_a_file_for_other_classes_is_one_sentence(kd: Command) -> None:
    from own_nets import Net  # type: ignore[import-not-found]

    torch.save(Net(5).state_dict(), "five.pt")
    with pytest.raises(SystemExit, match=r"fit: 'five\.pt' has weights for 5 classes and Net was built for 3; name a"):
        kd("fit", *STUDENT, "--model.teacher=own_nets.Net", "--teacher=five.pt", *QUICK)


def test_trained_configured_saved_and_tested(kd: Command) -> None:
    """The teacher's network is found in its run, and a student's in its checkpoint."""
    kd("fit", "-c", "photos/finetune", "--data.root=images", "--model.network=own_nets.Net", *QUICK[:-1],
       "--trainer.callbacks=kd_lightning.callbacks.AverageWeights")  # fmt: skip
    kd("fit", "-c", "photos/distill", "--data.root=images", "--model.student=timm/resnet10t", *QUICK)
    run = Path("lightning_logs/photos/distill/version_0")
    written = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert written["student"]["dict_kwargs"] == {"num_classes": 3}
    teacher = written["teacher"]["init_args"]
    assert teacher["network"] == {"class_path": "own_nets.Net", "init_args": {"num_classes": 3, "width": 4}}
    assert teacher["path"] == "lightning_logs/photos/finetune/version_0/checkpoints/best.ckpt"
    saved = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["student"]["dict_kwargs"] == {"num_classes": 3}
    assert "accuracy" in json.loads(_tested(kd, run).read_text())


def _tested(kd: Command, run: Path) -> Path:
    kd("test", "-c", "photos/distill", *QUIET)
    return run / "test.json"
