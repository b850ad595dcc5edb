"""Every recipe of the package runs for two steps on tiny data."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import yaml
from on_other_device import OTHER_DEVICE, call, on_other_device
from recipe_runs import DEVICE_RECIPES, fit_arguments

import kd_lightning.recipes
from kd_lightning.cli.recipes import recipes
from kd_lightning.errors import UserError
from kd_lightning.recipes import describe, is_shared, method_folders, recipe_files, recipe_names, recipe_texts

PACKAGED = Path(kd_lightning.recipes.__file__).parent
METHODS = [
    "at", "catkd", "cc", "crd", "ctkd", "dist", "dist_plus", "dkd", "fitnets", "logit_standardization",
    "mlld", "nkd", "nst", "ofa", "pkt", "queue_kl", "reviewkd", "rkd", "rld", "rsd", "sdd_dkd", "sdd_kd",
    "skd", "sp", "srd", "ttm", "uskd", "vid", "vitkd", "vkd", "wkd_f", "wkd_l", "wttm"
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * is_shared(name))
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


def test_each_method_exists_in_each_folder() -> None:
    assert method_folders() == ["cifar10", "cifar100", "digits", "photos"]
    for folder, method in product(method_folders(), METHODS):
        *shared, own = recipe_files(f"{folder}/{method}")
        assert [file.name for file in shared] == ["_base.yaml", "distill.yaml"]
        assert own.stem == method
        assert len(own.read_text().splitlines()) <= 9, "an overlay is short"
    for folder in method_folders():
        assert {f"{folder}/{name}" for name in ("distill", "simkd", "ema", "born_again")} <= set(recipe_names())


def test_no_two_files_are_alike_but_for_names() -> None:
    """Folders, networks and data sets are names; what else two files share belongs into one file."""
    names = r"(cifar10|cifar100|digits|photos|adapt|domains)/|kd_lightning\.networks\.\w+|num_classes: \d+"
    seen: dict[str, Path] = {}
    for file in sorted(PACKAGED.rglob("*.yaml")):
        lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
        if file.name != "_networks.yaml":
            text = re.sub(rf"{names}|, init_args: {{}}|\s", "", "".join(lines))
            assert text not in seen, f"{file} and {seen[text]} differ in names only; make a method of them"
            seen[text] = file


def test_names_are_filled_in() -> None:
    for name in recipe_names():
        for text in recipe_texts(name):
            assert "$" not in text
            assert isinstance(yaml.safe_load(text), dict)
    assert describe("cifar100/prune").startswith("Prune cifar100/distill to half its multiply-accumulates")
    assert "path: digits/teacher" in recipe_texts("digits/distill")[1]


def test_networks_without_a_teacher_are_not_distilled() -> None:
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


@pytest.mark.parametrize(("name", "rate"), [("mlld", 0.025), ("skd", 0.1)])
def test_a_recipe_shows_two_views_of_each_image(
    name: str, rate: float, kd: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        kd("fit", "-c", f"cifar100/{name}", "--data.second_view.magnitude=5", "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    second, model = config["data"]["init_args"]["second_view"], config["model"]["init_args"]
    assert (second["preset"], second["rand_augment"], second["magnitude"]) == ("light", 2, 5)
    optimizer = model["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (rate, 0.9, 5e-4)
    assert config["trainer"]["max_epochs"] == 240
    assert model["losses"].get("levels", {"init_args": {"two_views": True}})["init_args"]["two_views"]


def test_each_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    recipes()
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    own = [name for name in recipe_names() if not is_shared(name)]
    assert [name for name in listed if name in recipe_names()] == own
    assert {f".../{method}" for method in METHODS} <= set(listed)
    assert {"digits/crd", "digits/prune", "cifar10/teacher"} <= set(listed)
    assert all(20 < len(describe(name)) < 110 for name in recipe_names())


def test_an_unknown_one_lists_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'digits/distil' is neither a file nor a recipe; near ones are digits/dis"):
        recipe_files("digits/distil")


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("folder/teacher", "photos/teacher"),
        ("folder/fitnets", "photos/fitnets"),
        ("transfer/finetune", "photos/finetune"),
        ("transfer/other", "photos/finetune"),
    ],
)
def test_a_former_name_leads_to_the_recipe_in_its_place(former: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"^The recipes of \w+/ are those of photos/ now, .* type -c {name}\.$"):
        recipe_files(former)
