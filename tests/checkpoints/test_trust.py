import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from torch import nn

from kd_lightning import TeacherModule
from kd_lightning.checkpoints.trust import (
    check_trusted_classes,
    referenced_classes,
    restricted_imports,
    strip_pretrained,
    unserializable,
)


@pytest.fixture
def untrusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and was not."""
    (tmp_path / "untrusted.py").write_text("from torch import nn\n\nclass Network(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "untrusted"
    sys.modules.pop("untrusted", None)


NESTED: list[Callable[[str], Any]] = [
    lambda name: {"network": {"class_path": name}},
    lambda name: {"_class_path": name},
    lambda name: {"_instantiator": name},
    lambda name: {"losses": {"soft": {"class_path": "torch.nn.ReLU", "init_args": {"inner": {"class_path": name}}}}},
    lambda name: [{"a": 1}, {"class_path": name}],
    lambda name: {"stages": [[1, 2], ({"deep": [{"class_path": name}]},)]},
]


@pytest.mark.parametrize("build", NESTED)
def test_an_untrusted_class_is_refused_and_not_imported(build: Callable[[str], Any], untrusted: str) -> None:
    before = set(sys.modules)
    with pytest.raises(
        ValueError, match=r"^'a/best\.ckpt' names the class 'untrusted\.Network', which is not"
    ) as error:
        check_trusted_classes(build(f"{untrusted}.Network"), "a/best.ckpt")
    assert "add --trust, or in Python import 'untrusted' first." in str(error.value)
    assert set(sys.modules) == before


@pytest.mark.parametrize("build", NESTED)
@pytest.mark.parametrize(
    "name",
    ["kd_lightning.networks.resnet20", "torch.nn.Linear", "torchvision.models.resnet18", "collections.OrderedDict"],
)
def test_classes_of_trusted_or_imported_modules_are_accepted(build: Callable[[str], Any], name: str) -> None:
    check_trusted_classes(build(name), "a/best.ckpt")


def test_a_module_that_the_user_imported_is_accepted(untrusted: str) -> None:
    __import__(untrusted)
    check_trusted_classes({"class_path": "untrusted.Network"}, "a/best.ckpt")


@pytest.mark.parametrize(
    "name", ["torch_evil.Network", "kd_lightning_evil.Network", "torchvisions.Network", "Network", ""]
)
def test_names_similar_to_trusted_ones_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"names the class '{name}'"):
        check_trusted_classes({"class_path": name}, "a/best.ckpt")


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"class_path": "kd_lightning.networks.from_checkpoint", "init_args": {"path": "antigravity.pt"}},
        None,
        3,
        "untrusted.Network",
        {"learning_rate": 0.1, "layers": ["a.b", "c"], "path": "runs/best.ckpt"},
        [[], ()],
    ],
)
def test_plain_data_are_accepted(plain: Any) -> None:
    check_trusted_classes(plain, "a/best.ckpt")


def checkpoint(path: Path, hyper_parameters: dict[str, Any]) -> Path:
    weights = {f"network.{name}": value for name, value in nn.Linear(2, 3).state_dict().items()}
    version = {"kd_lightning_format": 1}
    torch.save({"state_dict": weights, "hyper_parameters": hyper_parameters, **version}, path)
    return path


CLI = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "kd_lightning.TeacherModule"}


def test_loading_a_checkpoint_does_not_import_untrusted_classes(tmp_path: Path, untrusted: str) -> None:
    import lightning.pytorch.cli  # noqa: F401 - as after any run of the command line

    network = {"class_path": f"{untrusted}.Network", "init_args": {"in_features": 2, "out_features": 3}}
    path = checkpoint(tmp_path / "a.ckpt", {**CLI, "network": network})
    with pytest.raises(ValueError, match=r"names the class 'untrusted\.Network'"):
        TeacherModule.load_from_checkpoint(path)
    assert untrusted not in sys.modules


@pytest.mark.parametrize("argument", ["network", "optimizer"])
def test_loading_a_checkpoint_does_not_import_classes_given_as_strings(
    tmp_path: Path, untrusted: str, argument: str
) -> None:
    import lightning.pytorch.cli  # noqa: F401

    network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    path = checkpoint(tmp_path / "a.ckpt", {**CLI, "network": network, argument: f"{untrusted}.Network"})
    with pytest.raises(Exception, match="untrusted"):
        TeacherModule.load_from_checkpoint(path)
    assert untrusted not in sys.modules


CLASSES = [
    "kd_lightning.TeacherModule",
    "kd_lightning.networks.resnet20",
    "kd_lightning.losses.HintLoss",
    "torch.nn.Linear",
    "torch.optim.AdamW",
    "torch.optim.lr_scheduler.StepLR",
    "torchvision.models.resnet18",
    "torchvision.models.googlenet",
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("build", NESTED)
def test_referenced_classes_are_found_by_all_their_paths(build: Callable[[str], Any], name: str) -> None:
    assert name in referenced_classes(build(name), "a/best.ckpt")
    assert any(len(path) > len(name) for path in referenced_classes({"x": "kd_lightning.TeacherModule"}, "a/best.ckpt"))


@pytest.mark.parametrize("name", ["collections.OrderedDict", "os.system", "torch.hub.load", "torch.Tensor"])
@pytest.mark.parametrize("build", NESTED)
def test_other_objects_are_refused(build: Callable[[str], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^'a/best.ckpt' names '{name}', which is not a network, loss, optimizer or"):
        referenced_classes(build(name), "a/best.ckpt")


@pytest.mark.parametrize("plain", [{}, None, {"a": 0.1, "b": ["torch.float32", "torch.nothing", "best.ckpt"]}, {"c.d"}])
def test_plain_data_reference_no_classes(plain: Any) -> None:
    assert referenced_classes(plain, "a/best.ckpt") == set()


def test_restricted_imports_restores_the_settings() -> None:
    from jsonargparse._common import parsing_settings

    before = dict(parsing_settings)
    with restricted_imports("a/best.ckpt", {"torch.nn.Linear"}):
        assert parsing_settings["import_path_verdicts"] == {"*": False, "torch.nn.Linear": True}
    assert parsing_settings == before
    with pytest.raises(KeyError), restricted_imports("a/best.ckpt", set()):
        raise KeyError
    assert parsing_settings == before


def test_objects_are_unserializable_unless_the_command_line_describes_them() -> None:
    assert unserializable("network", "optimizer") == ["network", "optimizer"]
    with _given_hyperparameters_context({"network": {"class_path": "torch.nn.Linear"}}, "an.instantiator"):
        assert unserializable("network", "optimizer") == []
    assert unserializable() == []


def test_a_module_built_from_python_saves_only_plain_hyper_parameters() -> None:
    module = TeacherModule(nn.Linear(2, 3), learning_rate=0.3, optimizer=torch.optim.AdamW)
    assert set(module.hparams) == {
        "label_smoothing",
        "learning_rate",
        "weight_decay",
        "lr_interval",
        "lr_monitor",
        "compile",
        "compile_mode",
        "cuda_graph",
        "class_weights",
        "on_nonfinite",
        "feature_cache",
        "layer_decay",
    }
    assert module.hparams["learning_rate"] == 0.3


def _node(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


@pytest.mark.parametrize(
    ("node", "stripped"),
    [
        (_node("torchvision.models.resnet18", weights="DEFAULT", progress=True), {"weights": None, "progress": True}),
        (_node("torchvision.models.ResNet", layers=[1, 1]), {"layers": [1, 1]}),
        (_node("torchvision.models.googlenet", weights="DEFAULT"), {"weights": "DEFAULT"}),  # built otherwise with them
        (_node("timm.create_model", model_name="a", pretrained=True), {"model_name": "a", "pretrained": False}),
        (_node("my_nets.Net", weights="DEFAULT", pretrained=True), {"weights": "DEFAULT", "pretrained": True}),
    ],
)  # fmt: skip
def test_networks_are_rebuilt_without_downloads(node: dict[str, Any], stripped: dict[str, Any]) -> None:
    before = copy.deepcopy(node)
    expected = {**node, "init_args": stripped}
    assert strip_pretrained(node) == expected
    around = _node("kd_lightning.networks.replace_head", network=node, num_classes=2)
    loaded = _node("kd_lightning.networks.from_checkpoint", network=around, path="a.ckpt")
    assert strip_pretrained(loaded) == _node("kd_lightning.networks.replace_head", network=expected, num_classes=2)
    assert node == before


def test_arguments_that_are_passed_on_download_nothing() -> None:
    node = {**_node("torchvision.models.get_model", name="resnet18"), "dict_kwargs": {"weights": "DEFAULT"}}
    assert strip_pretrained(node) == {**node, "dict_kwargs": {"weights": None}}
