"""What is read from the metadata of timm and torchvision is the transform that the library itself builds."""

from functools import cache
from typing import Any

import pytest
import timm
import torch
import torchvision.transforms.functional as F
from made_photographs import photograph
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, get_model_weights, list_models
from torchvision.models.quantization import ResNet18_QuantizedWeights
from torchvision.transforms._presets import ImageClassification

from kd_lightning.files.prepare import Preparation, prepare
from kd_lightning.networks import DataConfig, data_config, replace_head, set_data_config, torchvision_config
from kd_lightning.networks.data_config import train_on
from kd_lightning.networks.published_config import (
    _timm_classes,
    is_trained,
    named_weights,
    read_timm_config,
    timm_config,
    torchvision_config_of_file,
)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = [photograph(301, 432), photograph(417, 290), photograph(61, 75)]  # lying, standing, small


@cache
def timm_configurations() -> dict[str, dict[str, Any]]:
    """The configurations of all weights that timm publishes, by name."""
    found = {name: timm.models.get_pretrained_cfg(name) for name in timm.list_pretrained()}
    return {name: configuration.to_dict() for name, configuration in found.items() if configuration is not None}


def timm_transforms(configuration: dict[str, Any], **options: Any) -> list[Any]:
    resolved = resolve_data_config(pretrained_cfg=configuration, use_test_size=True)
    transform: Any = create_transform(**resolved, **options)
    return list(transform.transforms)


PARAMETERS = {
    "Resize": ("size", "interpolation", "max_size", "antialias"),
    "ResizeKeepRatio": ("size", "interpolation", "longest", "random_scale_prob", "random_aspect_prob"),
    "CenterCrop": ("size",),
    "CenterCropOrPad": ("size", "fill", "padding_mode"),
    "Normalize": ("mean", "std"),
    "MaybeToTensor": (),
}


def described(transforms: list[Any]) -> list[tuple[str, list[Any]]]:
    """The names and the parameters of transforms, in order."""
    names = [(transform, type(transform).__name__) for transform in transforms]
    return [(name, [plain(getattr(transform, field)) for field in PARAMETERS[name]]) for transform, name in names]


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return tuple(value) if isinstance(value, list) else getattr(value, "value", value)


def expected_transforms(config: DataConfig) -> list[tuple[str, list[Any]]]:
    """The transforms of timm that prepare images as a configuration says."""
    assert config.preparation is not None
    size, resize, mode, interpolation, fill = config.preparation
    normalize = [torch.tensor(config.mean).tolist(), torch.tensor(config.std).tolist()]
    crop: tuple[str, list[Any]] = ("CenterCrop", [size])
    if mode == "border":
        first: tuple[str, list[Any]] = ("ResizeKeepRatio", [resize, interpolation, 1.0, 0.0, 0.0])
        crop = ("CenterCropOrPad", [size, fill, "constant"])
    else:
        assert mode == "squash" or resize[0] == resize[1]
        first = ("Resize", [resize if mode == "squash" else resize[0], interpolation, None, True])
    return [first, crop, ("MaybeToTensor", []), ("Normalize", normalize)]


def test_all_of_timms_configurations_are_its_own_transforms() -> None:
    configurations = timm_configurations()
    assert len(configurations) > 1000
    differing = [
        name
        for name, configuration in configurations.items()
        if described(timm_transforms(configuration)) != expected_transforms(read_timm_config(configuration))
    ]
    assert not differing


def check_pixels_of_timm(configuration: dict[str, Any]) -> None:
    preparation = read_timm_config(configuration).preparation
    assert preparation is not None
    for image in PHOTOGRAPHS:
        shown: Any = image
        for transform in timm_transforms(configuration, normalize=False):
            shown = transform(shown)
        assert torch.equal(F.pil_to_tensor(prepare(image, preparation)), shown), configuration


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"input_size": (3, 96, 96), "crop_pct": 0.875},
        {"input_size": (3, 97, 97), "crop_pct": 1.0},
        {"input_size": (3, 64, 64), "test_input_size": (3, 80, 112), "crop_pct": 0.9, "test_crop_pct": 0.95},
    ],
    ids=["cropped", "whole", "not square"],
)
def test_pixels_of_timms_crop_modes(mode: str, interpolation: str, sizes: dict[str, Any]) -> None:
    check_pixels_of_timm({"crop_mode": mode, "interpolation": interpolation, "mean": (0.5, 0.4, 0.3), **sizes})


def test_pixels_of_all_of_timms_transforms() -> None:
    one_of_each = {read_timm_config(value).preparation: value for value in timm_configurations().values()}
    assert {preparation.mode for preparation in one_of_each if preparation} == {"center", "squash", "border"}
    for configuration in one_of_each.values():
        check_pixels_of_timm(configuration)


def test_the_size_is_that_of_the_published_accuracy() -> None:
    configuration = {"input_size": (3, 64, 64), "test_input_size": (3, 80, 80), "crop_pct": 0.8, "test_crop_pct": 1.0}
    known = read_timm_config(configuration)
    assert known.preparation == Preparation.of(80, fill=(124, 116, 104), interpolation="bicubic")
    assert known.train_size == (64, 64)
    assert read_timm_config({**configuration, "test_input_size": (3, 64, 64)}).train_size is None


def test_all_of_timms_training_sizes_are_those_of_its_own_transforms() -> None:
    for configuration in timm_configurations().values():
        known = read_timm_config(configuration)
        assert known.preparation is not None
        trained: Any = create_transform(**resolve_data_config(pretrained_cfg=configuration))
        (crop,) = [step for step in trained.transforms if type(step).__name__ in ("CenterCrop", "CenterCropOrPad")]
        assert (known.train_size or known.preparation.size) == tuple(crop.size)


def test_class_names_of_timms_configurations() -> None:
    named = {name for name, value in timm_configurations().items() if _timm_classes(value, value["num_classes"])}
    of_imagenet = {
        name
        for name, value in timm_configurations().items()
        if {"in1k", "in12k", "in21k", "in22k"} & set(name.partition(".")[2].split("_")) and value["num_classes"] > 0
    }
    assert named <= of_imagenet
    for name in of_imagenet - named:  # of other versions of ImageNet-21k, whose classes timm does not name
        assert infer_imagenet_subset(timm_configurations()[name]) is None


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "convnext_tiny.fb_in22k_ft_in1k_384", "resnet50.tv_in1k"])
def test_imagenets_classes_have_one_name_in_timm_and_torchvision(name: str) -> None:
    found = _timm_classes(timm_configurations()[name], 1000)
    assert found is not None
    assert found == torchvision_config(ResNet18_Weights.DEFAULT).classes
    assert len(set(found)) == 1000
    synonyms = [names.split(", ") for names in ImageNetInfo("imagenet-1k").label_descriptions()]
    differing = [ours for ours, theirs in zip(found, synonyms, strict=True) if ours not in theirs]
    assert differing == ["crane bird", "maillot tank suit"]


def test_larger_versions_of_imagenet_have_the_names_of_timm() -> None:
    found = _timm_classes({"num_classes": 11821, "tag": "sw_in12k"}, 11821)
    assert found == tuple(ImageNetInfo("imagenet-12k").label_descriptions())


def test_class_names_of_a_model_of_the_hub() -> None:
    labels = {"num_classes": 2, "label_names": ("n1", "n2"), "label_descriptions": {"n1": "cat"}}
    assert _timm_classes(labels, 2) == ("cat", "n2")
    assert _timm_classes(labels, 3) is None
    assert _timm_classes({"num_classes": 1000, "tag": "a1_in1k"}, 10) is None
    assert _timm_classes({"num_classes": 1000, "tag": "fb_dino"}, 1000) is None


# --- networks of timm


def trained(name: str, **options: Any) -> nn.Module:
    """A network of timm with weights that are not random."""
    network: nn.Module = timm.create_model(name, **options)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(0.01)
    return network


def test_a_trained_network_of_timm_has_its_published_configuration() -> None:
    assert data_config(timm.create_model("resnet10t")) == DataConfig()
    known = data_config(trained("resnet10t"))
    assert known == read_timm_config(timm_configurations()["resnet10t.c3_in1k"])._replace(classes=known.classes)
    assert known[:2] == IMAGENET
    assert known.classes is not None
    assert (known.classes[0], len(known.classes)) == ("tench", 1000)
    assert data_config(trained("resnet10t", num_classes=5)) == known._replace(classes=None)
    assert data_config(replace_head(trained("resnet10t"), 1000)) == known._replace(classes=None)


def test_a_network_built_for_another_size_has_that_one() -> None:
    preparation = data_config(trained("test_vit", num_classes=5)).preparation
    assert preparation is not None
    assert data_config(trained("test_vit", img_size=96)).preparation == preparation  # takes any size
    other = data_config(trained("vit_tiny_patch16_224", img_size=96)).preparation
    assert other == Preparation.of(96, 106, interpolation="bicubic", fill=(128, 128, 128))


def test_what_is_attached_comes_before_the_published_configuration() -> None:
    network = trained("resnet10t")
    own = DataConfig.of([0.4] * 3, [0.2] * 3, ["a"], Preparation.of(64))
    set_data_config(network, own)
    assert data_config(network) == own
    student = timm.create_model("resnet10t", num_classes=1)
    train_on(student, own)
    student.train()(torch.rand(2, 3, 32, 32))
    assert is_trained(student)
    assert data_config(student) == own


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "visformer_tiny", "volo_d1_224", "tresnet_m"])
def test_networks_with_other_channels_have_no_published_configuration(name: str) -> None:
    with torch.device("meta"):
        for channels in (1, 3, 4, 6):
            network = timm.create_model(name, in_chans=channels)
            assert timm_config(network) == DataConfig() or channels == 3
            assert (timm_config(network).mean is not None) == (channels == 3)


@pytest.mark.parametrize(
    "name",
    ["resnet10t", "test_vit", "test_nfnet", "repvgg_a0", "convnext_atto", "swinv2_tiny_window8_256", "resmlp_12_224"],
)
def test_random_networks_are_not_trained(name: str) -> None:
    network = timm.create_model(name)
    assert not is_trained(network)
    assert is_trained(trained(name))


def test_one_step_makes_a_network_a_trained_one() -> None:
    network = timm.create_model("test_vit")
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    network(torch.rand(2, 3, 160, 160)).logsumexp(1).sum().backward()
    optimizer.step()
    assert is_trained(network)


# --- torchvision


def classification_weights() -> list[Any]:
    found = [weights for model in list_models() for weights in get_model_weights(model)]
    return [weights for weights in found if isinstance(weights.transforms(), ImageClassification)]


def test_all_of_torchvisions_weights_are_its_own_transforms() -> None:
    published = classification_weights()
    assert len(published) > 100
    seen = set()
    for weights in published:
        known, transform = torchvision_config(weights), weights.transforms()
        categories = weights.meta["categories"]  # VGG16's features have none
        assert known.classes == (None if categories is None else tuple(categories))
        assert torchvision_config_of_file(f"folder/{weights.url.rpartition('/')[2]}") == known
        key = (known.preparation, known.mean, known.std)
        if key in seen:
            continue
        seen.add(key)
        assert known.preparation is not None
        for image in PHOTOGRAPHS:
            pixels = F.pil_to_tensor(prepare(image, known.preparation)).float() / 255
            assert torch.equal(F.normalize(pixels, list(known.mean or ()), list(known.std or ())), transform(image))


def test_weights_that_do_not_classify_have_no_configuration() -> None:
    others = [weights for model in list_models() for weights in get_model_weights(model)]
    others = [weights for weights in others if not isinstance(weights.transforms(), ImageClassification)]
    assert len(others) > 10
    for weights in others:
        assert torchvision_config(weights) == DataConfig()
        assert torchvision_config_of_file(weights.url) == DataConfig()


@pytest.mark.parametrize("name", ["best.ckpt", "resnet50-00000000.pth", "weights.pth", "resnet50-11ad3fa6.pt"])
def test_other_files_are_unknown(name: str) -> None:
    assert torchvision_config_of_file(name) == DataConfig()


RESNET = "torchvision.models.resnet18"


@pytest.mark.parametrize(
    "weights", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", ResNet18_Weights.DEFAULT]
)
def test_weights_that_a_configuration_names(weights: Any) -> None:
    node = {"class_path": RESNET, "init_args": {"weights": weights}}
    around = {"class_path": "my_package.around", "init_args": {"network": node}}
    for one in (node, around, {**node, "class_path": "torchvision.models.resnet.resnet18"}):
        assert named_weights(one) == torchvision_config(ResNet18_Weights.DEFAULT)


def test_weights_that_a_configuration_names_otherwise() -> None:
    quantized = {"class_path": "torchvision.models.quantization.resnet18", "init_args": {"weights": "DEFAULT"}}
    assert named_weights(quantized) == torchvision_config(ResNet18_QuantizedWeights.DEFAULT)
    by_name = {"class_path": "torchvision.models.get_model", "init_args": {"name": "resnet50"}}
    assert named_weights({**by_name, "dict_kwargs": {"weights": "DEFAULT"}}) == torchvision_config(
        ResNet50_Weights.DEFAULT
    )


@pytest.mark.parametrize(
    "node",
    [
        None,
        "resnet18",
        {"class_path": RESNET},
        {"class_path": RESNET, "init_args": {"weights": None}},
        {"class_path": "my_package.MyNetwork", "init_args": {"weights": "weights.pt"}},
        {"class_path": "kd_lightning.networks.from_checkpoint",
         "init_args": {"network": {"class_path": RESNET, "init_args": {"weights": "DEFAULT"}}, "path": "own.pt"}},
    ],
)  # fmt: skip
def test_configurations_that_name_no_weights(node: Any) -> None:
    assert named_weights(node) == DataConfig()
