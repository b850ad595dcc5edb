import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from torch import nn

from kd_lightning import TeacherModule
from kd_lightning.checkpoints.trust import check_trusted_classes, referenced_classes, restricted_imports, unserializable


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that could be imported and was not."""
    (tmp_path / "stranger.py").write_text("from torch import nn\n\nclass Network(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "stranger"
    sys.modules.pop("stranger", None)


NESTED: list[Callable[[str], Any]] = [
    lambda name: {"network": {"class_path": name}},
    lambda name: {"_class_path": name},
    lambda name: {"_instantiator": name},
    lambda name: {"losses": {"soft": {"class_path": "torch.nn.ReLU", "init_args": {"inner": {"class_path": name}}}}},
    lambda name: [{"a": 1}, {"class_path": name}],
    lambda name: {"stages": [[1, 2], ({"deep": [{"class_path": name}]},)]},
]


@pytest.mark.parametrize("build", NESTED)
def test_a_foreign_class_is_named_and_not_imported(build: Callable[[str], Any], stranger: str) -> None:
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"^'a/best\.ckpt' names the class 'stranger\.Network', which is not") as error:
        check_trusted_classes(build(f"{stranger}.Network"), "a/best.ckpt")
    assert "import 'stranger' yourself first if you trust it." in str(error.value)
    assert set(sys.modules) == before


@pytest.mark.parametrize("build", NESTED)
@pytest.mark.parametrize(
    "name",
    ["kd_lightning.networks.resnet20", "torch.nn.Linear", "torchvision.models.resnet18", "collections.OrderedDict"],
)
def test_known_classes_and_imported_modules_pass(build: Callable[[str], Any], name: str) -> None:
    check_trusted_classes(build(name), "a/best.ckpt")


def test_what_was_imported_first_passes(stranger: str) -> None:
    __import__(stranger)
    check_trusted_classes({"class_path": "stranger.Network"}, "a/best.ckpt")


@pytest.mark.parametrize(
    "name", ["torch_evil.Network", "kd_lightning_evil.Network", "torchvisions.Network", "Network", ""]
)
def test_a_name_that_only_looks_known_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"names the class '{name}'"):
        check_trusted_classes({"class_path": name}, "a/best.ckpt")


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"class_path": "kd_lightning.networks.from_checkpoint", "init_args": {"path": "antigravity.pt"}},
        None,
        3,
        "stranger.Network",
        {"learning_rate": 0.1, "layers": ["a.b", "c"], "path": "runs/best.ckpt"},
        [[], ()],
    ],
)
def test_plain_data_pass(plain: Any) -> None:
    check_trusted_classes(plain, "a/best.ckpt")


def checkpoint(path: Path, hyper_parameters: dict[str, Any]) -> Path:
    weights = {f"network.{name}": value for name, value in nn.Linear(2, 3).state_dict().items()}
    version = {"kd_lightning_format": 1}
    torch.save({"state_dict": weights, "hyper_parameters": hyper_parameters, **version}, path)
    return path


CLI = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "kd_lightning.TeacherModule"}


def test_a_checkpoint_cannot_have_a_class_imported(tmp_path: Path, stranger: str) -> None:
    import lightning.pytorch.cli  # noqa: F401 - as after any run of the command line

    network = {"class_path": f"{stranger}.Network", "init_args": {"in_features": 2, "out_features": 3}}
    path = checkpoint(tmp_path / "a.ckpt", {**CLI, "network": network})
    with pytest.raises(ValueError, match=r"names the class 'stranger\.Network'"):
        TeacherModule.load_from_checkpoint(path)
    assert stranger not in sys.modules


@pytest.mark.parametrize("argument", ["network", "optimizer"])
def test_a_checkpoint_cannot_have_a_class_imported_by_its_bare_name(
    tmp_path: Path, stranger: str, argument: str
) -> None:
    import lightning.pytorch.cli  # noqa: F401

    network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    path = checkpoint(tmp_path / "a.ckpt", {**CLI, "network": network, argument: f"{stranger}.Network"})
    with pytest.raises(Exception, match="stranger"):
        TeacherModule.load_from_checkpoint(path)
    assert stranger not in sys.modules


PARTS = [
    "kd_lightning.TeacherModule",
    "kd_lightning.networks.resnet20",
    "kd_lightning.losses.HintLoss",
    "torch.nn.Linear",
    "torch.optim.AdamW",
    "torch.optim.lr_scheduler.StepLR",
    "torchvision.models.resnet18",
    "torchvision.models.googlenet",
]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("build", NESTED)
def test_parts_are_found_by_all_their_names(build: Callable[[str], Any], name: str) -> None:
    assert name in referenced_classes(build(name), "a/best.ckpt")
    assert any(len(path) > len(name) for path in referenced_classes({"x": "kd_lightning.TeacherModule"}, "a/best.ckpt"))


@pytest.mark.parametrize("name", ["collections.OrderedDict", "os.system", "torch.hub.load", "torch.Tensor"])
@pytest.mark.parametrize("build", NESTED)
def test_what_is_no_part_is_refused(build: Callable[[str], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^'a/best.ckpt' names '{name}', which is not a network, loss, optimizer or"):
        referenced_classes(build(name), "a/best.ckpt")


@pytest.mark.parametrize("plain", [{}, None, {"a": 0.1, "b": ["torch.float32", "torch.nothing", "best.ckpt"]}, {"c.d"}])
def test_plain_data_are_no_parts(plain: Any) -> None:
    assert referenced_classes(plain, "a/best.ckpt") == set()


def test_what_may_be_imported_is_as_before_after_a_module_is_rebuilt() -> None:
    from jsonargparse._common import parsing_settings

    before = dict(parsing_settings)
    with restricted_imports("a/best.ckpt", {"torch.nn.Linear"}):
        assert parsing_settings["import_path_verdicts"] == {"*": False, "torch.nn.Linear": True}
    assert parsing_settings == before
    with pytest.raises(KeyError), restricted_imports("a/best.ckpt", set()):
        raise KeyError
    assert parsing_settings == before


def test_objects_are_left_out_unless_the_command_line_describes_them() -> None:
    assert unserializable("network", "optimizer") == ["network", "optimizer"]
    with _given_hyperparameters_context({"network": {"class_path": "torch.nn.Linear"}}, "an.instantiator"):
        assert unserializable("network", "optimizer") == []
    assert unserializable() == []


def test_a_module_built_from_python_keeps_plain_numbers_only() -> None:
    module = TeacherModule(nn.Linear(2, 3), learning_rate=0.3, optimizer=torch.optim.AdamW)
    assert set(module.hparams) == {
        "label_smoothing",
        "learning_rate",
        "weight_decay",
        "lr_interval",
        "compile",
        "on_nonfinite",
        "feature_cache",
        "layer_decay",
    }
    assert module.hparams["learning_rate"] == 0.3
