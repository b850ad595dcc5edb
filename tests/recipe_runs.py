"""Recipes, cut to two steps on tiny data that this file makes: for tests that run them on some device."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from kd_lightning.networks import LeNet, ResNet, resnet8x4, resnet20, resnet32x4, resnet34
from kd_lightning.recipes import recipe_names

QUICK = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "adapt": lambda: LeNet(image_size=16),
    "digits": lambda: ResNet([2, 2, 2], [16, 32, 64], in_channels=1),
    "cifar10": resnet34,
    "cifar100": lambda: resnet32x4(num_classes=100),
    "photos": lambda: resnet18(num_classes=10),  # in place of a larger one
}
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "digits": lambda: ResNet([1, 1, 1], [2, 4, 8], in_channels=1),
    "cifar10": resnet20,
    "cifar100": lambda: resnet8x4(num_classes=100),
    "photos": lambda: resnet18(num_classes=10),
}
DEVICE_RECIPES = [
    name
    for name in recipe_names()
    if name.partition("/")[0] not in ("cifar10", "cifar100", "photos")
    or name.endswith(("/distill", "/finetune", "/probe"))
]
"""Each method once and one recipe of each other folder: what is run on other devices than the CPU."""


def make_image_folder(root: Path, classes: int) -> Path:
    """Make a folder of tiny images, two of each class for training and for validation."""
    for split, number, label in product(("train", "val"), range(2), range(classes)):
        folder = root / split / f"{label:02}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (2 * label, 100 * number, 0)).save(folder / f"{number}.png")
    return root


def fit_arguments(name: str, folder: Path) -> list[str]:
    """List the arguments of `kd-lightning` that fit a recipe on tiny data, which are made in a folder."""
    recipes, _, method = name.partition("/")
    arguments = ["fit", "-c", name, *QUICK]
    if recipes in ("adapt", "domains"):
        arguments += [f"--data.{domain}=kd_lightning.DigitsDataModule" for domain in ("source", "target")]
        arguments += ["--data.source.batch_size=16", "--data.target.batch_size=16"]
        arguments += [] if method == "distil_target" else ["--trainer.callbacks.images=16"]  # of a slow picture
    elif recipes == "digits":
        arguments.append("--data.batch_size=4")
    else:
        root = make_image_folder(folder / "images", 100 if recipes == "cifar100" else 10)
        size = 64 if recipes == "photos" else 32  # of which the last maps have more than one pixel
        arguments += ["--data=ImageFolderDataModule", f"--data.root={root}", f"--data.image_size={size}"]
        arguments.append("--data.batch_size=4")
    if method in ("teacher", "student", "finetune", "probe"):
        arguments += ["--model.network=torchvision/resnet18"] if recipes == "photos" else []
    elif method == "uskd":  # has no teacher
        arguments += ["--model.student=torchvision/resnet18"] if recipes == "photos" else []
    elif name == "adapt/distil_target" or recipes not in ("adapt", "domains"):
        taught_by_its_like = method in ("born_again", "qat") or (method == "prune" and recipes != "digits")
        path = save_network(recipes, "student" if taught_by_its_like else "teacher", folder)
        arguments += ["--model.teacher_check=off", "--teacher", str(path)]
        if recipes == "photos":
            arguments += _random_weights(method)
    if method == "prune":
        arguments.append("--trainer.callbacks.epochs=[0]")  # of the one epoch here
    return arguments


def _random_weights(method: str) -> list[str]:
    """List the arguments that name small networks in place of published ones, which cannot be downloaded in tests."""
    roles = {"prune": [], "qat": [], "born_again": ["student"]}
    roles["simkd"] = ["student.backbone", "student.classifier.network", "teacher"]
    return [f"--model.{role}=torchvision/resnet18" for role in roles.get(method, ["student", "teacher"])]


def save_network(recipes: str, role: str, folder: Path) -> Path:
    """Save an untrained network of a folder of recipes, ``"teacher"`` or ``"student"``."""
    path = folder / f"{role}.pt"
    networks = TEACHERS if role == "teacher" else STUDENTS
    torch.save(networks[recipes]().state_dict(), path)
    return path
