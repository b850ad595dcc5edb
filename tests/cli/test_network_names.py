"""Short names of networks, written out."""

from typing import Any

import pytest
import timm
import torchvision

from kd_lightning.cli.network_names import is_short_name, long_form, published_classes
from kd_lightning.errors import UserError


def tag_of(name: str) -> str | None:
    published = timm.get_pretrained_cfg(name)
    assert published is not None
    return published.tag


@pytest.mark.parametrize(
    ("value", "short"),
    [
        ("timm/resnet10t", True),
        ("timm/resnet10t.c3_in1k@pretrained", True),
        ("torchvision/vit_b_16@IMAGENET1K_V1", True),
        ("timm.create_model", False),
        ("torchvision.models.resnet18", False),
        ("runs/timm/resnet10t", False),
        ("timm/resnet10t/version_0", False),
        ("timm/", False),
        (None, False),
        ({"class_path": "timm/resnet10t"}, False),
    ],
)
def test_what_is_a_short_name(value: object, short: bool) -> None:
    assert is_short_name(value) == short


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "vit_b_16", "convnext_tiny"])
def test_networks_of_torchvision_get_the_classes_of_the_data(name: str) -> None:
    node = long_form(f"torchvision/{name}", 7)
    built = torchvision.models.get_model(node["init_args"]["name"], **node["dict_kwargs"])
    assert node["class_path"] == "torchvision.models.get_model"
    assert any(tuple(weight.shape[:1]) == (7,) for weight in built.parameters())


def test_published_weights_of_torchvision_get_a_new_head_unless_their_own_fits() -> None:
    node = long_form("torchvision/resnet50@IMAGENET1K_V2", 7)
    assert node["class_path"] == "kd_lightning.networks.replace_head"
    assert node["init_args"]["num_classes"] == 7
    inner = {"class_path": "torchvision.models.get_model", "init_args": {"name": "resnet50"}}
    assert node["init_args"]["network"] == {**inner, "dict_kwargs": {"weights": "IMAGENET1K_V2"}}
    assert long_form("torchvision/resnet50@pretrained", 1000) == node["init_args"]["network"]
    assert long_form("torchvision/resnet50@pretrained", 7, keep_head=True) == node["init_args"]["network"]


def test_networks_of_timm_have_a_head_for_the_classes_of_the_data() -> None:
    random = long_form("timm/resnet10t", 7)
    assert random["init_args"] == {"model_name": "resnet10t", "pretrained": False}
    assert timm.create_model(**random["init_args"], **random["dict_kwargs"]).num_classes == 7
    tag = tag_of("resnet10t")
    for name in ("timm/resnet10t@pretrained", f"timm/resnet10t@{tag}", f"timm/resnet10t.{tag}@pretrained"):
        found = long_form(name, 7)["init_args"]
        assert (found["model_name"].partition(".")[0], found["pretrained"]) == ("resnet10t", True)
        assert tag_of(found["model_name"]) == tag
    assert long_form(f"timm/resnet10t.{tag}", 7)["init_args"]["pretrained"] is False


def test_the_classes_of_published_weights_are_known() -> None:
    assert published_classes("torchvision/resnet18@pretrained") == 1000
    assert published_classes("timm/resnet10t@pretrained") == 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet10", r"^timm has no network 'resnet10'; near ones are resnet10t, "),
        ("timm/resnet10t@a9_in1k", r"^timm publishes no weights 'a9_in1k' for resnet10t; choose from: c3_in1k"),
        ("timm/resnet10t.a9_in1k", r"^timm publishes no weights 'a9_in1k' for resnet10t; choose from: c3_in1k"),
        ("torchvision/resnet17", r"^torchvision has no classifier 'resnet17'; near ones are resnet1"),
        ("torchvision/fcn_resnet50", r"^torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision/resnet18@V3", r"no weights 'V3' for resnet18; choose from: IMAGENET1K_V1, DEFAULT\.$"),
    ],
)
def test_names_that_do_not_exist_are_refused_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        long_form(name, 2)


def test_a_network_of_timm_without_weights_is_refused() -> None:
    name = next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}*"))
    with pytest.raises(UserError, match=rf"^timm publishes no weights for {name}; leave out @pretrained for random"):
        long_form(f"timm/{name}@pretrained", 2)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("kd_lightning.export.extra.import_module", missing)
    with pytest.raises(UserError, match=r"^timm of the extra `timm` is not installed; run `pip install \"\.\[timm\]"):
        long_form("timm/resnet10t", 2)
