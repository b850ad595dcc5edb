import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.features import FeatureTap, Outputs, evaluating, layer_shapes
from kd_lightning.losses import AttentionLoss, HintLoss, SimilarityLoss
from kd_lightning.networks import ResNet, resnet20


class Odd(nn.Module):
    """A layer that never runs, one that returns a pair and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveMaxPool2d(1, return_indices=True)
        self.twice = nn.Linear(1, 1)
        self.idle = nn.Linear(1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.twice(self.twice(self.pool(images)[0].flatten(1)))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 1, 8, 8)


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_reads_what_the_layers_return(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small().eval()
    logits, features = FeatureTap(network, ["layer1", "layer2.0.conv1", "fc"])(images)
    assert list(features) == ["layer1", "layer2.0.conv1", "fc"]
    stem = torch.relu(network.bn1(network.conv1(images)))
    torch.testing.assert_close(features["layer1"], network.get_submodule("layer1")(stem))
    torch.testing.assert_close(features["layer2.0.conv1"], network.get_submodule("layer2.0.conv1")(features["layer1"]))
    assert logits is features["fc"]
    torch.testing.assert_close(logits, network(images))


def test_torchvision_networks_are_read_as_they_are() -> None:
    network = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    before = copy.deepcopy(network.state_dict())
    logits, features = FeatureTap(network, ["layer1", "layer4.1.bn2", "avgpool"])(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert {name: tuple(feature.shape) for name, feature in features.items()} == {
        "layer1": (2, 64, 8, 8),
        "layer4.1.bn2": (2, 512, 1, 1),
        "avgpool": (2, 512, 1, 1),
    }
    torch.testing.assert_close(network.fc(features["avgpool"].flatten(1)), logits)
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_features_carry_gradient(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small()
    FeatureTap(network, ["layer1"])(images).features["layer1"].sum().backward()
    assert network.conv1.weight.grad is not None
    assert network.fc.weight.grad is None


def test_without_layers_no_hook_is_installed(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small().eval()
    tap = FeatureTap(network)
    assert hooks(network) == 0
    outputs = tap(images)
    assert tap.layers == ()
    assert outputs.features == {}
    torch.testing.assert_close(outputs.logits, network(images))


def test_a_layer_named_twice_is_read_once(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small()
    tap = FeatureTap(network, ["layer2", "layer1", "layer2"])
    assert tap.layers == tuple(tap(images).features) == ("layer2", "layer1")
    assert hooks(network) == 2


@pytest.mark.parametrize("name", ["layer3", "layer1.0.conv9", "", "Layer1"])
def test_a_wrong_name_lists_the_candidates(small: Callable[..., ResNet], name: str) -> None:
    network = small()
    with pytest.raises(
        ValueError,
        match=rf"^ResNet has no layer '{name}'; choose from \(shapes for a 32x32 image\): conv1 \(4, 32, 32\), ",
    ) as caught:
        FeatureTap(network, ["layer1", name])
    assert all(layer in str(caught.value) for layer in ("layer1.0.conv1", "layer2.0.downsample.0", "fc (10,)"))
    assert hooks(network) == 0


def test_a_layer_that_does_not_run_is_named() -> None:
    with pytest.raises(ValueError, match=r"^Layer 'idle' did not run in the network's forward; name a layer that does"):
        FeatureTap(Odd(), ["idle"])(torch.rand(2, 1, 4, 4))


def test_a_layer_that_returns_no_tensor_is_named() -> None:
    with pytest.raises(ValueError, match="pool returns a tuple and not one tensor"):
        FeatureTap(Odd(), ["pool"])(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="returns a tuple and not only its logits"):
        FeatureTap(Odd().pool)(torch.rand(2, 1, 4, 4))


def test_of_a_layer_that_runs_twice_the_last_output_is_read() -> None:
    outputs = FeatureTap(Odd(), ["twice"])(torch.rand(2, 1, 4, 4))
    assert outputs.features["twice"] is outputs.logits


def test_two_taps_of_one_network_do_not_mix(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small()
    one, other = FeatureTap(network, ["layer1"]), FeatureTap(network, ["layer1", "layer2"])
    assert list(one(images).features) == ["layer1"]
    assert list(other(images).features) == ["layer1", "layer2"]


def test_an_earlier_call_is_not_overwritten(small: Callable[..., ResNet], images: Tensor) -> None:
    tap = FeatureTap(small().eval(), ["layer1"])
    first = tap(images).features["layer1"]
    kept = first.clone()
    tap(images + 1)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("through_tap", [True, False])
def test_nothing_is_kept_alive(small: Callable[..., ResNet], images: Tensor, through_tap: bool) -> None:
    network, seen = small(), []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(weakref.ref(output))

    tap = FeatureTap(network, ["layer1"])
    network.get_submodule("layer1").register_forward_hook(watch)
    (tap if through_tap else network)(images)
    gc.collect()
    assert seen[0]() is None


def test_after_an_error_the_tap_works_again(small: Callable[..., ResNet], images: Tensor) -> None:
    tap = FeatureTap(small(), ["layer1"])
    with pytest.raises(RuntimeError):
        tap(images[:, :, :, :0])
    assert list(tap(images).features) == ["layer1"]


def test_remove_takes_the_hooks_out(small: Callable[..., ResNet]) -> None:
    network = small()
    tap, other = FeatureTap(network, ["layer1", "layer2"]), FeatureTap(network, ["layer1"])
    assert hooks(network) == 3
    tap.remove()
    assert hooks(network) == 1
    other.remove()
    assert hooks(network) == 0


def test_a_copied_network_works_and_can_be_tapped(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small().eval()
    tap = FeatureTap(network, ["layer1"])
    copied = copy.deepcopy(network)
    with torch.no_grad():
        copied.conv1.weight.zero_()
    expected = tap(images)
    outputs = FeatureTap(copied, ["layer1"])(images)
    assert not torch.equal(outputs.features["layer1"], expected.features["layer1"])
    assert torch.equal(tap(images).features["layer1"], expected.features["layer1"])


def test_a_copied_tap_reads_its_own_network(small: Callable[..., ResNet], images: Tensor) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small().eval()
            self.tap = FeatureTap(self.network, ["layer1"])

    module = Module()
    copied = copy.deepcopy(module)
    assert copied.tap.network is copied.network
    assert copied.network is not module.network
    with torch.no_grad():
        copied.network.conv1.weight.zero_()
        copied.network.bn1.weight.zero_()
    assert module.tap(images).features["layer1"].std() > 0
    assert copied.tap(images).features["layer1"].std(0).max() == 0
    copied.tap.remove()
    assert (hooks(copied.network), hooks(module.network)) == (0, 1)
    assert list(module.tap(images).features) == ["layer1"]


def test_outputs_without_features() -> None:
    assert Outputs(torch.zeros(1, 2)).features == {}


def test_layer_shapes_are_those_of_the_outputs(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small()
    shapes = layer_shapes(network, images)
    assert shapes["layer1"] == (3, 4, 8, 8)
    assert shapes["layer2"] == (3, 8, 4, 4)
    assert shapes["fc"] == (3, 10)
    features = FeatureTap(network, list(shapes))(images).features
    assert {name: tuple(feature.shape) for name, feature in features.items()} == shapes
    order = list(shapes)
    assert order.index("conv1") < order.index("layer1.0.conv1") < order.index("layer1") < order.index("layer2")
    assert order[-1] == "fc"


def test_layer_shapes_leave_the_network_as_it_was(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small().train()
    before = copy.deepcopy(network.state_dict())
    layer_shapes(network, images)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert hooks(network) == 0
    assert network.training
    with pytest.raises(RuntimeError):
        layer_shapes(network, images.expand(-1, 2, -1, -1))
    assert hooks(network) == 0


def test_layer_shapes_leave_out_what_is_no_tensor_or_does_not_run() -> None:
    assert layer_shapes(Odd(), torch.rand(2, 1, 4, 4)) == {"twice": (2, 1)}


def test_evaluating_restores_each_layers_own_mode(small: Callable[..., ResNet], images: Tensor) -> None:
    network = small().train()
    network.get_submodule("layer1").eval()
    modes = {name: module.training for name, module in network.named_modules()}
    assert len(set(modes.values())) == 2
    with evaluating(network):
        assert not any(module.training for module in network.modules())
        assert not network(images).requires_grad
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert torch.is_grad_enabled()


def test_evaluating_restores_after_an_error(small: Callable[..., ResNet]) -> None:
    network = small().train()
    with pytest.raises(KeyError), evaluating(network):
        raise KeyError
    assert all(module.training for module in network.modules())
    assert torch.is_grad_enabled()


def test_an_output_that_is_overwritten_in_place_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten())
    FeatureTap(network, ["0", "2"]).check_not_overwritten(torch.randn(2, 1, 3, 3))
    with pytest.raises(ValueError, match="What layer '1' gives is overwritten in place by what follows it"):
        FeatureTap(network, ["0", "1"]).check_not_overwritten(torch.randn(2, 1, 3, 3))


def test_the_role_is_named(small: Callable[..., ResNet]) -> None:
    with pytest.raises(ValueError, match=r"^The teacher \(ResNet\) has no layer 'layer9'"):
        FeatureTap(small(), ["layer9"], "teacher")


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[1, 1], num_heads=[1, 1], window_size=[2, 2], num_classes=10
    )


def _convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(12, 24, 1), setting(24, None, 1)], num_classes=10)


@pytest.mark.parametrize(
    ("build", "layers", "shapes"),
    [
        (_swin, ["features.0", "features.1", "features.3", "norm", "permute"], [12, 12, 24, 24, 24]),
        (_convnext, ["features.0", "features.1", "features.1.0.block.5", "features.3"], [12, 12, 12, 24]),
        (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224",
                img_size=32,
                window_size=2,
                embed_dim=12,
                depths=(1, 1),
                num_heads=(1, 1),
            ),
            ["layers.0", "layers.1", "norm"],
            [12, 24, 24],
        ),
        (lambda: torchvision.models.resnet18(num_classes=10), ["layer1", "layer4.0.conv1"], [64, 512]),
    ],
)
def test_channels_last_maps_are_read_with_the_channels_first(
    build: Callable[[], nn.Module], layers: list[str], shapes: list[int]
) -> None:
    network, images = build().eval(), torch.rand(2, 3, 32, 32)
    tap = FeatureTap(network, layers)
    tap.find_channels_last(images)
    tap.check_not_overwritten(images)
    features = tap(images).features
    assert [features[name].shape[1] for name in layers] == shapes
    assert all(maps.shape[2] == maps.shape[3] for maps in features.values())


def test_losses_on_maps_take_channels_last_ones(make_trainer: Callable[..., pl.Trainer]) -> None:
    student, teacher = resnet20(num_classes=10), _swin()
    reads: dict[str, Any] = {"student_layers": ["layer2"], "teacher_layers": ["features.3"]}
    losses = {"hint": HintLoss(**reads), "attention": AttentionLoss(**reads), "similarity": SimilarityLoss(**reads)}
    module = DistillationModule(student, teacher, losses=losses, teacher_check="off")
    loader = DataLoader(TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8)), batch_size=4)
    make_trainer(max_epochs=1).fit(module, loader, loader)
    shapes = module.losses.shapes
    assert shapes is not None
    assert shapes[1] is not None
    assert list(shapes[1]["features"]["features.3"])[1:] == [24, 4, 4]
