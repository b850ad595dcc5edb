"""Published teachers of RepDistiller and mdistiller: their key names, their numbers of parameters and their logits."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import published_forward as published
import pytest
import torch
from torch import Tensor, nn

from kd_lightning import networks
from kd_lightning.networks import from_checkpoint, resnet20, wrn_16_2
from kd_lightning.networks.published_names import published_names

Forward = Callable[[published.Weights, Tensor], Tensor]

# parameters with 100 classes, as counted in https://github.com/HobbitLong/RepDistiller, and some of the key names there
NETWORKS: dict[str, tuple[int, Forward, list[str]]] = {
    "resnet32x4": (
        7433860,
        partial(published.resnet, blocks=5, widths=(32, 64, 128, 256)),
        ["conv1.weight", "layer1.0.downsample.0.weight", "layer3.4.bn2.running_var", "fc.bias"],
    ),
    "resnet56": (
        861620,
        partial(published.resnet, blocks=9, widths=(16, 16, 32, 64)),
        ["layer2.0.downsample.1.running_mean", "layer3.8.conv2.weight"],
    ),
    "resnet110": (
        1736564,
        partial(published.resnet, blocks=18, widths=(16, 16, 32, 64)),
        ["layer3.17.bn1.weight"],
    ),
    "resnet18": (
        11220132,
        published.resnet18,
        ["layer2.0.shortcut.1.running_mean", "layer4.1.conv2.weight", "linear.bias"],
    ),
    "resnet50": (
        23705252,
        published.resnet50,
        ["layer1.0.shortcut.0.weight", "layer4.2.bn3.weight", "linear.weight"],
    ),
    "wrn_40_2": (
        2255156,
        partial(published.wide_resnet, depth=40, widen=2),
        ["block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.running_mean", "bn1.weight", "fc.weight"],
    ),
    "wrn_16_2": (703284, partial(published.wide_resnet, depth=16, widen=2), ["block2.layer.1.conv2.weight"]),
    "vgg8": (3965028, partial(published.vgg, convolutions=1), ["block0.0.bias", "block4.1.running_var"]),
    "vgg13": (9462180, partial(published.vgg, convolutions=2), ["block3.4.weight", "classifier.weight"]),
    "mobilenet_v2_half": (
        812836,
        published.mobilenet_v2_half,
        ["conv1.0.weight", "blocks.1.0.conv.3.weight", "blocks.6.0.conv.7.bias", "conv2.1.weight", "classifier.0.bias"],
    ),
    "shufflenet_v1": (949258, published.shufflenet_v1, ["layer2.7.conv3.weight", "linear.weight"]),
    "shufflenet_v2": (1355528, published.shufflenet_v2, ["layer1.0.conv5.weight", "layer3.3.bn3.bias", "bn2.weight"]),
}


def build(name: str, **options: Any) -> nn.Module:
    return getattr(networks, name)(**options)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts_match_repdistiller(name: str) -> None:
    with torch.device("meta"):
        network = build(name, num_classes=100)
    assert sum(weight.numel() for weight in network.parameters()) == NETWORKS[name][0]


def written(path: Path, weights: dict[str, Tensor], *, by: str) -> Path:
    """Write a file as the training scripts of one of the projects do.

    Both compute the learning rate with NumPy, whose number goes into the file beside the weights.
    """
    learning_rate = 0.05 * 0.1 ** np.sum(np.asarray([150, 180, 210]) < 240)
    assert isinstance(learning_rate, np.float64)
    optimizer = {"state": {}, "param_groups": [{"lr": learning_rate, "params": [0, 1]}]}
    if by == "RepDistiller":  # with PyTorch 1.0
        content = {"epoch": 240, "model": weights, "accuracy": torch.tensor([79.4]), "optimizer": optimizer}
        torch.save(content, path / "ckpt_epoch_240.pth", _use_new_zipfile_serialization=False)
        return path / "ckpt_epoch_240.pth"
    if by == "mdistiller":
        content = {"epoch": 240, "model": weights, "optimizer": optimizer, "best_acc": torch.tensor([79.4])}
        torch.save(content, path / "ti_res18")
        return path / "ti_res18"
    torch.save({"model": weights}, path / "student_best")
    return path / "student_best"


def drawn(forward: Forward) -> published.Weights:
    weights = published.Weights()
    forward(weights, torch.randn(1, 3, 32, 32))
    return weights


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_file_is_read_and_gives_the_published_logits(name: str, tmp_path: Path) -> None:
    count, forward, keys = NETWORKS[name]
    weights = drawn(forward)
    assert set(keys) <= set(weights)
    assert sum(value.numel() for key, value in weights.items() if key.endswith((".weight", ".bias"))) == count
    exact = published.Weights({key: value.double() for key, value in weights.items()})
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = forward(exact, images)
    network = build(name, num_classes=100)
    for by in ("RepDistiller", "mdistiller", "mdistiller's student"):
        for values in network.state_dict().values():
            values.zero_()
        path = written(tmp_path, OrderedDict(weights), by=by)
        logits = from_checkpoint(network.float(), path).eval().double()(images)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_a_student_is_found_in_a_whole_run_of_mdistiller_where_nothing_else_was_trained(tmp_path: Path) -> None:
    weights = drawn(NETWORKS["wrn_16_2"][1])
    run = {f"module.student.{key}": value for key, value in weights.items()}
    torch.save({"epoch": 240, "model": run, "best_acc": torch.tensor([75.0])}, tmp_path / "best")
    network = from_checkpoint(wrn_16_2(num_classes=100), tmp_path / "best", rename={"student.": ""})
    assert network.get_parameter("layer1.0.downsample.weight").equal(weights["block1.layer.0.convShortcut.weight"])


def test_files_from_several_gpus_and_from_before_batch_counters_are_read(tmp_path: Path) -> None:
    weights = published.Weights()
    published.wide_resnet(weights, torch.randn(2, 3, 8, 8), 16, 2)
    old = {f"module.{key}": value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "a.pth")
    network = from_checkpoint(wrn_16_2(num_classes=100), tmp_path / "a.pth")
    assert network.get_parameter("layer2.0.downsample.weight").equal(weights["block2.layer.0.convShortcut.weight"])


def test_names_are_translated_only_where_they_are_all_of_the_network(tmp_path: Path) -> None:
    linear, ours = ["linear.weight", "linear.bias"], ["fc.weight", "fc.bias"]
    assert published_names(linear, set(ours)) == dict(zip(linear, ours, strict=True))
    for keys in (linear[:1], [*linear, "more"], [*linear[:1], *ours]):
        assert published_names(keys, set(ours)) == {key: key for key in keys}
    weights = published.Weights()
    published.wide_resnet(weights, torch.randn(2, 3, 8, 8), 22, 2)
    torch.save(dict(weights), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"does not fit WideResNet \(missing: .*unexpected: block1\.layer\.0"):
        from_checkpoint(wrn_16_2(num_classes=100), tmp_path / "a.pth")


def test_a_network_with_such_names_of_its_own_is_read_as_it_is(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block1, self.linear = nn.Linear(2, 3), nn.Linear(3, 4)

    saved, filled = Own(), Own()
    torch.save({"module." + key: value for key, value in saved.state_dict().items()}, tmp_path / "a.pth")
    from_checkpoint(filled, tmp_path / "a.pth")
    assert filled.linear.weight.equal(saved.linear.weight)
    with pytest.raises(ValueError, match=r"does not fit ResNet .*missing: conv1"):
        from_checkpoint(resnet20(), tmp_path / "a.pth")
