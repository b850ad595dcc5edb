"""Every recipe of the package runs for two steps on tiny data."""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from kd_lightning.networks import LeNet, ResNet, resnet8x4, resnet20, resnet32x4, resnet34
from kd_lightning.recipes import describe, recipe_files, recipe_names, recipes

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.batch_size=4",
]


TEACHERS = {
    "adapt": lambda: LeNet(image_size=16),
    "digits": lambda: ResNet([2, 2, 2], [16, 32, 64], in_channels=1),
    "cifar10": resnet34,
    "cifar100": lambda: resnet32x4(num_classes=100),
    "folder": resnet34,
}
STUDENTS = {
    "digits": lambda: ResNet([1, 1, 1], [2, 4, 8], in_channels=1),
    "cifar10": resnet20,
    "cifar100": lambda: resnet8x4(num_classes=100),
    "folder": resnet20,
}
METHODS = ["at", "cc", "crd", "dist", "dkd", "fitnets", "logit_standardization"]
METHODS += ["nst", "pkt", "reviewkd", "rkd", "sp", "vid"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Makes, once, a folder of tiny images of so many classes."""

    @cache
    def build(classes: int) -> Path:
        root = tmp_path_factory.mktemp("images")
        for split, number, label in product(("train", "val"), range(2), range(classes)):
            folder = root / split / f"{label:02}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), (2 * label, 100 * number, 0)).save(folder / f"{number}.png")
        return root

    return build


@pytest.mark.parametrize("name", recipe_names())
def test_it_runs(name: str, kd: Callable[..., str], image_folder: Callable[[int], Path], tmp_path: Path) -> None:
    folder, _, method = name.partition("/")
    arguments = ["fit", "-c", name, *QUICK]
    if folder in ("adapt", "domains"):
        arguments.remove("--data.batch_size=4")
        arguments += [f"--data.{domain}=kd_lightning.DigitsDataModule" for domain in ("source", "target")]
        arguments += ["--data.source.batch_size=16", "--data.target.batch_size=16"]
    elif folder != "digits":
        root = image_folder(100 if folder == "cifar100" else 10)
        arguments += ["--data=ImageFolderDataModule", f"--data.root={root}", "--data.image_size=32"]
        arguments.append("--data.batch_size=4")
    if folder == "transfer":
        arguments += ["--model.network.network=kd_lightning.networks.resnet20", "--model.network.num_classes=10"]
    elif name == "adapt/distil_target" or (folder not in ("adapt", "domains") and method not in ("teacher", "student")):
        taught_by_its_like = method in ("born_again", "qat") or (method == "prune" and folder != "digits")
        teacher = (STUDENTS if taught_by_its_like else TEACHERS)[folder]()
        torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
        arguments += ["--model.teacher_check=off", "--teacher", str(tmp_path / "teacher.pt")]
    if method == "prune":
        arguments.append("--trainer.callbacks.epochs=[0]")  # of the one epoch here
    assert "The best checkpoint is" in kd(*arguments)


def test_each_method_is_there_in_each_folder() -> None:
    for folder, method in product(("cifar10", "cifar100", "digits", "folder"), METHODS):
        *shared, own = recipe_files(f"{folder}/{method}")
        assert [file.name for file in shared] == ["_base.yaml", "distill.yaml"]
        assert own.stem == method
        assert len(own.read_text().splitlines()) <= 9, "an overlay is short"
    for folder in ("cifar10", "cifar100", "digits", "folder"):
        assert {f"{folder}/{name}" for name in ("distill", "simkd", "ema", "born_again")} <= set(recipe_names())


def test_networks_alone_are_not_distilled() -> None:
    assert [file.name for file in recipe_files("cifar100/teacher")] == ["_base.yaml", "teacher.yaml"]


def test_an_overlay_replaces_the_losses(kd: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kd("fit", "-c", "cifar100/dkd", "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    model = config["model"]["init_args"]
    assert list(model["losses"]) == ["hard", "decoupled"]
    published = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "weight": 1.0, "warmup_epochs": 20}
    assert model["losses"]["decoupled"]["init_args"] == published
    assert (model["temperature"], model["alpha"]) == (None, None)
    assert model["student"]["class_path"].endswith("resnet8x4")
    assert model["optimizer"]["init_args"]["lr"] == 0.05
    assert config["trainer"]["max_epochs"] == 240


def test_each_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    recipes()
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    own = [name for name in recipe_names() if recipe_files(name)[-1].parent.name != "_methods"]
    assert [name for name in listed if name in recipe_names()] == own
    assert {f".../{method}" for method in METHODS} <= set(listed)
    assert all(20 < len(describe(name)) < 110 for name in recipe_names())


def test_an_unknown_one_lists_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'digits/distil' is neither a file nor a recipe; near ones are digits/dis"):
        recipe_files("digits/distil")
