"""ResNets against published ones: numbers of parameters, names of layers, and logits."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from kd_lightning import networks
from kd_lightning.networks import ResNet, resnet18, resnet20, resnet34
from kd_lightning.networks.resnet import _Block

# 10 classes, shortcut A: K. He et al. as counted at https://github.com/akamaster/pytorch_resnet_cifar10
PAPER = {"resnet20": 269722, "resnet32": 464154, "resnet44": 658586, "resnet56": 853018, "resnet110": 1727962}
# 100 classes, shortcut B: the benchmark of https://github.com/HobbitLong/RepDistiller
BENCHMARK = {
    "resnet20": 278324,
    "resnet32": 472756,
    "resnet56": 861620,
    "resnet110": 1736564,
    "resnet8x4": 1233540,
    "resnet32x4": 7433860,
}
# 10 classes, 3x3 stem: https://github.com/kuangliu/pytorch-cifar
IMAGENET_STYLE = {"resnet18": 11173962, "resnet34": 21282122}


def count_parameters(name: str, **options: object) -> int:
    with torch.device("meta"):
        network = getattr(networks, name)(**options)
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(("name", "count"), PAPER.items())
def test_parameter_counts_match_the_paper(name: str, count: int) -> None:
    assert count_parameters(name, shortcut="A") == count


@pytest.mark.parametrize(("name", "count"), BENCHMARK.items())
def test_parameter_counts_match_repdistiller(name: str, count: int) -> None:
    assert count_parameters(name, num_classes=100) == count


@pytest.mark.parametrize(("name", "count"), IMAGENET_STYLE.items())
def test_parameter_counts_match_pytorch_cifar(name: str, count: int) -> None:
    assert count_parameters(name) == count


@pytest.mark.parametrize("name", [*PAPER, "resnet8x4", "resnet32x4", "resnet18", "resnet34"])
@pytest.mark.parametrize(("shortcut", "in_channels"), [("A", 1), ("B", 4)])
def test_builders_accept_num_classes_shortcut_and_in_channels(name: str, shortcut: str, in_channels: int) -> None:
    with torch.device("meta"):
        network = getattr(networks, name)(num_classes=7, shortcut=shortcut, in_channels=in_channels)
        logits = network(torch.empty(2, in_channels, 32, 32))
    assert logits.shape == (2, 7)
    convolutions = [key for key in network.state_dict() if "downsample" in key]
    assert bool(convolutions) == (shortcut == "B")


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (17, 9)])
def test_images_of_any_size_are_accepted(size: tuple[int, int]) -> None:
    logits = resnet20(num_classes=5)(torch.rand(2, 3, *size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_each_stage_after_the_first_halves_the_resolution() -> None:
    network = ResNet([1, 2, 1], [4, 8, 12], stem_width=6)
    shapes = {}
    for name in ("conv1", "layer1", "layer2", "layer3"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, maps, name=name: shapes.update({name: tuple(maps.shape[1:])})
        )
    network(torch.rand(1, 3, 16, 16))
    assert shapes == {"conv1": (6, 16, 16), "layer1": (4, 16, 16), "layer2": (8, 8, 8), "layer3": (12, 4, 4)}


@pytest.mark.parametrize(("ours", "theirs"), [(resnet18, "resnet18"), (resnet34, "resnet34")])
def test_layer_names_and_shapes_match_torchvision(ours: type, theirs: str) -> None:
    with torch.device("meta"):
        reference = torchvision.models.get_model(theirs, num_classes=10)
        reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network = ours()
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}
    for name in ("conv1", "bn1", "layer1.0.conv1", "layer2.0.downsample.0", "layer4", "fc"):
        assert type(network.get_submodule(name)) is type(reference.get_submodule(name))


def test_logits_match_torchvision() -> None:
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1, reference.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    network = resnet18()
    randomize_batch_norms(reference)
    network.load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, 16, 16)
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(images), reference.train(mode)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "front", "back"), [(8, 2, 2), (7, 1, 2), (4, 0, 0)])
def test_shortcut_a_subsamples_and_pads_channels_with_zeros(width: int, front: int, back: int) -> None:
    network = ResNet([1, 1], [4, width], shortcut="A").eval()
    randomize_batch_norms(network)
    block = network.get_submodule("layer2.0")
    assert isinstance(block, _Block)
    assert not list(block.downsample.parameters())
    assert not list(block.downsample.buffers())
    maps = torch.randn(3, 4, 9, 6)
    kept = maps[:, :, ::2, ::2]
    zeros = torch.zeros(3, 1, *kept.shape[2:])
    shortcut = torch.cat([zeros.expand(-1, front, -1, -1), kept, zeros.expand(-1, back, -1, -1)], dim=1)
    residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(maps)))))
    assert torch.equal(block(maps), F.relu(residual + shortcut))


def test_shortcut_b_projects_only_where_the_shape_changes() -> None:
    network = resnet20()
    changes = {name for name, module in network.named_modules() if name.endswith("downsample.0")}
    assert changes == {"layer2.0.downsample.0", "layer3.0.downsample.0"}
    for name in changes:
        convolution = network.get_submodule(name)
        assert (convolution.kernel_size, convolution.stride, convolution.bias) == ((1, 1), (2, 2), None)


def test_no_relu_module_is_shared() -> None:
    assert not [module for module in resnet20().modules() if isinstance(module, nn.ReLU)]


def test_a_copy_is_independent_and_gives_the_same_logits() -> None:
    network = ResNet([1, 1], [4, 8]).eval()
    images = torch.rand(2, 3, 8, 8)
    logits = network(images)
    copied = copy.deepcopy(network)
    nn.init.zeros_(network.fc.weight)
    assert torch.equal(copied(images), logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [1, 1], "widths": [4]}, r"Give one width for each stage, got blocks=\[1, 1\] and widths=\[4\]\."),
        ({"blocks": [], "widths": []}, r"Give one width for each stage, got blocks=\[\] and widths=\[\]\."),
        ({"blocks": [1], "widths": [4], "shortcut": "C"}, r"shortcut must be 'A' or 'B', got 'C'\."),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ResNet(**options)


def randomize_batch_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
