"""Every recipe of the package runs for two steps on tiny data."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import yaml
from on_other_device import OTHER_DEVICE, call, on_other_device
from recipe_runs import DEVICE_RECIPES, fit_arguments

from kd_lightning.cli.recipes import recipes
from kd_lightning.recipes import describe, recipe_files, recipe_names

METHODS = ["at", "cc", "crd", "dist", "dkd", "fitnets", "logit_standardization"]
METHODS += ["nst", "pkt", "reviewkd", "rkd", "sp", "vid"]


def of_a_shared_method(name: str) -> bool:
    """Return whether a recipe differs from one of the digits in the networks of its folder's distill alone."""
    return recipe_files(name)[-1].parent.name == "_methods"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * of_a_shared_method(name))
        for name in recipe_names()
        if name not in DEVICE_RECIPES
    ],
)
def test_it_runs(name: str, kd: Callable[..., str], tmp_path: Path) -> None:
    assert "The best checkpoint is" in kd(*fit_arguments(name, tmp_path), "--trainer.accelerator=cpu")


@pytest.mark.parametrize("name", DEVICE_RECIPES)
@on_other_device
def test_it_runs_on_another_device(name: str, tmp_path: Path) -> None:
    assert "The best checkpoint is" in call(tmp_path, *fit_arguments(name, tmp_path), *OTHER_DEVICE)


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
