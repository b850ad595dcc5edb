import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning import networks
from kd_lightning.networks import WideResNet, wrn_16_2


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        # 100 classes: the benchmark of https://github.com/HobbitLong/RepDistiller
        ("wrn_16_2", 100, 703284),
        ("wrn_40_1", 100, 569780),
        ("wrn_40_2", 100, 2255156),
        # 10 classes: the paper's 36.5 M
        ("wrn_28_10", 10, 36479194),
    ],
)
def test_parameter_counts_match_the_published_ones(name: str, classes: int, count: int) -> None:
    with torch.device("meta"):
        network = getattr(networks, name)(num_classes=classes)
    assert sum(weight.numel() for weight in network.parameters()) == count


@pytest.mark.parametrize("name", ["wrn_16_2", "wrn_40_1", "wrn_40_2", "wrn_28_10"])
def test_builders_accept_num_classes_and_in_channels(name: str) -> None:
    with torch.device("meta"):
        network = getattr(networks, name)(num_classes=7, in_channels=1)
        assert network(torch.empty(2, 1, 32, 32)).shape == (2, 7)


def test_layer_names_follow_torchvision() -> None:
    network = wrn_16_2()
    for name in ("conv1", "bn1", "layer1.0.conv1", "layer1.1.bn2", "layer2.0.downsample", "layer3", "fc"):
        network.get_submodule(name)


def test_logits_match_the_papers_formula() -> None:
    network = WideResNet(depth=16, widen=1, num_classes=5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                assert values is not None
                nn.init.normal_(values)
    weights, images = network.state_dict(), torch.rand(2, 3, 16, 16)
    maps = F.conv2d(images, weights["conv1.weight"], padding=1)
    for layer, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
        maps = _block(weights, f"{layer}.0", maps, stride)
        maps = _block(weights, f"{layer}.1", maps, stride=1)
    logits = F.linear(_norm_relu(weights, "bn1", maps).mean((2, 3)), weights["fc.weight"], weights["fc.bias"])
    torch.testing.assert_close(network(images), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [4, 9, 12, 41])
def test_an_invalid_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^The depth of a wide ResNet is 6n \+ 4 \(.*\), got {depth}\.$"):
        WideResNet(depth, widen=1)


def _norm_relu(weights: dict[str, Tensor], name: str, maps: Tensor) -> Tensor:
    mean, var, scale, shift = (weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.relu(F.batch_norm(maps, mean, var, scale, shift))


def _block(weights: dict[str, Tensor], name: str, maps: Tensor, stride: int) -> Tensor:
    active = _norm_relu(weights, f"{name}.bn1", maps)
    residual = F.conv2d(active, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
    residual = F.conv2d(_norm_relu(weights, f"{name}.bn2", residual), weights[f"{name}.conv2.weight"], padding=1)
    shortcut = weights.get(f"{name}.downsample.weight")
    return residual + (maps if shortcut is None else F.conv2d(active, shortcut, stride=stride))
