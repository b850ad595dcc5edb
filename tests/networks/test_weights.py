"""Loading weights: published layouts of checkpoints are read, damaged and malicious files are refused."""

import copy
import pickle
import random
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from kd_lightning.errors import UserError
from kd_lightning.files.prepare import Preparation
from kd_lightning.networks import (
    DataConfig,
    ResNet,
    data_config,
    from_checkpoint,
    read_checkpoint,
    replace_head,
    resnet20,
    set_data_config,
    torchvision_config,
    wrn_16_2,
)

STATISTICS: dict[str, Any] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classes": ["ant", "bee", "cat"]}


def random_network(classes: int = 3) -> ResNet:
    built = ResNet([1, 1], [2, 4], num_classes=classes)
    for tensor in built.state_dict().values():  # so that no two are the same, batch norms included
        tensor.copy_(torch.rand(tensor.shape) * 100)
    return built


def have_equal_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def with_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return OrderedDict((prefix + key, value) for key, value in weights.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda weights: {"model": weights, "best": 0.9},
        lambda weights: with_prefix(weights, "module."),
        lambda weights: {"model": with_prefix(weights, "module.")},
        lambda weights: with_prefix(weights, "_orig_mod."),
        lambda weights: {"state_dict": with_prefix(weights, "network.")},
        lambda weights: {"state_dict": with_prefix(weights, "network._orig_mod.")},
    ],
    ids=["bare", "state_dict", "model", "module", "model.module", "compiled", "network", "network compiled"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_all_published_layouts_are_read(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any], zipped: bool) -> None:
    saved, filled = random_network(), random_network()
    torch.save(wrap(saved.state_dict()), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert from_checkpoint(filled, tmp_path / "a.pt") is filled
    assert have_equal_weights(filled, saved)
    assert data_config(filled) == DataConfig()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".th", ".bin"])
def test_file_suffix_and_path_type_do_not_matter(tmp_path: Path, suffix: str) -> None:
    saved = random_network()
    torch.save(saved.state_dict(), tmp_path / f"a{suffix}")
    assert have_equal_weights(from_checkpoint(random_network(), str(tmp_path / f"a{suffix}")), saved)


def test_only_the_network_is_read_from_a_lightning_checkpoint(tmp_path: Path) -> None:
    saved, filled = random_network(), random_network()
    weights = with_prefix(saved.state_dict(), "network.")
    weights |= {"losses.hint.regressor.weight": torch.rand(3, 3), "conv1.weight": torch.rand(7)}
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": weights}, tmp_path / "a.ckpt")
    assert have_equal_weights(from_checkpoint(filled, tmp_path / "a.ckpt"), saved)


def test_unexpected_weights_in_other_checkpoints_are_refused(tmp_path: Path) -> None:
    weights = with_prefix(random_network().state_dict(), "network.") | {"head.weight": torch.rand(3, 3)}
    torch.save({"state_dict": weights}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"unexpected: head\.weight"):
        from_checkpoint(random_network(), tmp_path / "a.pt")


def test_safetensors_are_read(tmp_path: Path) -> None:
    saved = random_network()
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "a.safetensors")
    assert have_equal_weights(from_checkpoint(random_network(), tmp_path / "a.safetensors"), saved)


def test_rename_replaces_prefixes_of_keys(tmp_path: Path) -> None:
    saved = random_network()
    weights = {
        key.replace("fc.", "linear.").replace("layer1.0.", "first."): value for key, value in saved.state_dict().items()
    }
    torch.save(with_prefix(weights, "module."), tmp_path / "a.pt")
    filled = from_checkpoint(random_network(), tmp_path / "a.pt", rename={"linear.": "fc.", "first.": "layer1.0."})
    assert have_equal_weights(filled, saved)


def test_a_published_legacy_file_is_read(tmp_path: Path) -> None:
    """The layout of https://github.com/akamaster/pytorch_resnet_cifar10, from before batch counters."""
    saved, filled = resnet20(shortcut="A"), resnet20(shortcut="A")
    weights = OrderedDict(
        ("module." + key.replace("fc.", "linear."), value)
        for key, value in saved.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )
    torch.save({"best_prec1": 92.6, "state_dict": weights}, tmp_path / "a.th", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "a.th")
    from_checkpoint(
        filled, tmp_path / "a.th", rename={"linear.": "fc."}, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert have_equal_weights(filled, saved)
    assert data_config(filled) == DataConfig.of((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_weights_of_another_precision_are_converted(tmp_path: Path) -> None:
    saved = random_network()
    torch.save({key: value.half() for key, value in saved.state_dict().items()}, tmp_path / "a.pt")
    filled = random_network()
    from_checkpoint(filled, tmp_path / "a.pt")
    assert filled.fc.weight.dtype == torch.float32
    assert torch.equal(filled.fc.weight, saved.fc.weight.half().float())


def test_the_data_config_of_the_file_is_attached(tmp_path: Path) -> None:
    torch.save({"state_dict": random_network().state_dict(), "data_config": STATISTICS}, tmp_path / "a.pt")
    filled = from_checkpoint(random_network(), tmp_path / "a.pt")
    expected = DataConfig.of((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), ("ant", "bee", "cat"))
    assert data_config(filled) == expected
    assert data_config(copy.deepcopy(filled)) == expected
    assert have_equal_weights(copy.deepcopy(filled), filled)
    assert "data_config" not in filled.state_dict()


def test_given_statistics_replace_those_of_the_file(tmp_path: Path) -> None:
    torch.save(random_network().state_dict(), tmp_path / "foreign.pt")
    torch.save({"state_dict": random_network().state_dict(), "data_config": STATISTICS}, tmp_path / "ours.pt")
    given: dict[str, Any] = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert data_config(from_checkpoint(random_network(), tmp_path / "foreign.pt", **given)) == DataConfig(*statistics)
    filled = from_checkpoint(random_network(), tmp_path / "ours.pt", **given)
    assert data_config(filled) == DataConfig(*statistics, ("ant", "bee", "cat"))


def test_a_given_configuration_replaces_what_it_names(tmp_path: Path) -> None:
    saved = {**STATISTICS, "preparation": Preparation.of(32)._asdict(), "train_size": [24, 24]}
    torch.save({"state_dict": random_network().state_dict(), "data_config": saved}, tmp_path / "ours.pt")
    of_file = data_config(from_checkpoint(random_network(), tmp_path / "ours.pt"))
    assert of_file == DataConfig.of(**saved)
    declared = DataConfig.of([0.0] * 3, [1.0] * 3, preparation=Preparation.of(64, 72))
    filled = from_checkpoint(random_network(), tmp_path / "ours.pt", data_config=declared)
    assert data_config(filled) == declared._replace(classes=of_file.classes)
    classes = DataConfig.of(classes=["a", "b", "c"])
    filled = from_checkpoint(random_network(), tmp_path / "ours.pt", data_config=classes, mean=[0] * 3, std=[1] * 3)
    assert data_config(filled) == of_file._replace(mean=(0, 0, 0), std=(1, 1, 1), classes=("a", "b", "c"))
    with pytest.raises(UserError, match=r"^Give mean and std, or a data_config that contains them; not both\.$"):
        from_checkpoint(random_network(), tmp_path / "ours.pt", data_config=declared, mean=[0] * 3, std=[1] * 3)


def test_a_published_file_of_torchvision_has_its_configuration(tmp_path: Path) -> None:
    weights = ResNet18_Weights.IMAGENET1K_V1
    file = tmp_path / weights.url.rpartition("/")[2]
    torch.save(resnet18().state_dict(), file)
    filled = from_checkpoint(resnet18(), file)
    assert data_config(filled) == torchvision_config(weights)
    shutil.copy(file, tmp_path / "weights.pth")
    assert data_config(from_checkpoint(resnet18(), tmp_path / "weights.pth")) == DataConfig()
    known = torchvision_config(weights)
    assert data_config(from_checkpoint(resnet18(), tmp_path / "weights.pth", data_config=known)) == known
    own = from_checkpoint(resnet18(), file, mean=[0.5] * 3, std=[0.5] * 3)
    assert data_config(own) == known._replace(mean=(0.5,) * 3, std=(0.5,) * 3)


def random_deep_network(*blocks: int) -> ResNet:
    built = ResNet(list(blocks), [2, 4], num_classes=3)
    for tensor in built.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 100)
    return built


def test_layers_of_a_deeper_network_initialize_a_student(tmp_path: Path) -> None:
    teacher, student = random_deep_network(3, 4), random_deep_network(2, 2)
    torch.save({"state_dict": teacher.state_dict(), "data_config": STATISTICS}, tmp_path / "teacher.pt")
    from_checkpoint(student, tmp_path / "teacher.pt", layers={"layer1.1": "layer1.2", "layer2.1": "layer2.3"})
    taken = {"layer1.0": "layer1.0", "layer1.1": "layer1.2", "layer2.0": "layer2.0", "layer2.1": "layer2.3"}
    for own, its in {**taken, "conv1": "conv1", "bn1": "bn1", "fc": "fc"}.items():
        assert have_equal_weights(student.get_submodule(own), teacher.get_submodule(its)), own
    assert data_config(student).mean == (0.5, 0.4, 0.3)


def test_a_deeper_network_is_refused_without_valid_layers(tmp_path: Path) -> None:
    torch.save(random_deep_network(3, 4).state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"unexpected: layer1\.1"):
        from_checkpoint(random_deep_network(1, 2), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"layers names 'layer7', which ResNet does not have"):
        from_checkpoint(random_deep_network(1, 2), tmp_path / "teacher.pt", layers={"layer7": "layer1.0"})
    with pytest.raises(ValueError, match=r"missing: layer1\.0\.conv1\.weight"):
        from_checkpoint(random_deep_network(1, 2), tmp_path / "teacher.pt", layers={"layer1.0": "layer1.9"})
    with pytest.raises(ValueError, match="of another shape"):
        from_checkpoint(random_deep_network(1, 2), tmp_path / "teacher.pt", layers={"layer1.0": "layer2.1"})


def test_a_mean_alone_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give both or neither"):
        from_checkpoint(random_network(), tmp_path / "none.pt", mean=[0.5])


def test_loading_a_second_file_replaces_the_data_config(tmp_path: Path) -> None:
    torch.save({"state_dict": random_network().state_dict(), "data_config": STATISTICS}, tmp_path / "first.pt")
    torch.save(random_network().state_dict(), tmp_path / "second.pt")
    filled = from_checkpoint(from_checkpoint(random_network(), tmp_path / "first.pt"), tmp_path / "second.pt")
    assert data_config(filled) == DataConfig()


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        expected = f"There is no checkpoint {str(path)!r}; check the path, or train the network first."
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(expected)}$"):
            from_checkpoint(random_network(), path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, zipped: bool, share: float) -> None:
    filled, path = random_network(), tmp_path / "a.pt"
    before = copy.deepcopy(filled)
    torch.save(random_network().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=f"^{re.escape(repr(str(path)))} .*(damaged|format)"):
        from_checkpoint(filled, path)
    assert have_equal_weights(filled, before)


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(random_network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .* copy or download it again"):
        from_checkpoint(random_network(), path)


def test_a_flipped_bit_in_a_tensor_is_refused(tmp_path: Path) -> None:
    saved, path = random_network(), tmp_path / "a.pt"
    torch.save(saved.state_dict(), path)
    content = path.read_bytes()
    for name in ("conv1.weight", "bn1.running_var", "fc.bias"):
        values = saved.state_dict()[name].numpy().tobytes()
        assert content.count(values) == 1
        for bit in (0, 7, 8 * len(values) - 1):
            path.write_bytes(flip_bit(content, 8 * content.index(values) + bit))
            with pytest.raises(ValueError, match=r"does not match its checksum.*copy or download it again"):
                from_checkpoint(random_network(), path)


def test_a_record_that_a_flipped_bit_turns_into_a_folder_is_refused(tmp_path: Path) -> None:
    """PyTorch would return uninitialized memory in its place."""
    path = tmp_path / "a.pt"
    torch.save(random_network().state_dict(), path)
    content = path.read_bytes()
    for name in (b"a/data/0", b"a/data/7"):
        path.write_bytes(flip_bit(content, 8 * (content.rindex(name) - 8) + 4))
        with pytest.raises(ValueError, match="does not match its checksum or its index"):
            from_checkpoint(random_network(), path)


def test_a_flipped_bit_never_changes_weights_silently(tmp_path: Path) -> None:
    saved, path = random_network(), tmp_path / "a.pt"
    torch.save({"state_dict": saved.state_dict(), "data_config": STATISTICS}, path)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        path.write_bytes(flip_bit(content, draw.randrange(8 * len(content))))
        try:
            filled = from_checkpoint(random_network(), path)
        except ValueError:
            refused += 1
        else:
            assert have_equal_weights(filled, saved)
            assert data_config(filled) == DataConfig.of(**STATISTICS)
    assert refused > 50


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, layout: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"state_dict": random_network().state_dict(), "extra": Payload(trace)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
        torch.load(path, weights_only=False)
    assert trace.exists()  # which shows that the payload works
    trace.unlink()
    filled = random_network()
    before = copy.deepcopy(filled)
    with pytest.raises(ValueError, match=r"is not a checkpoint of tensors and plain data .* code, which was not run"):
        from_checkpoint(filled, path)
    assert not trace.exists()
    assert have_equal_weights(filled, before)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor a zip", b"\x80\x02}q\x00."])
def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(repr(str(path)))} .*[;,] .*\\.$"):
        from_checkpoint(random_network(), path)


def test_a_single_tensor_is_refused(tmp_path: Path) -> None:
    torch.save(torch.rand(3), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds a Tensor and not a state dict or a checkpoint"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not contain weights, neither bare nor under 'state_dict' or 'model'"):
        from_checkpoint(random_network(), tmp_path / "a.pt")


def test_all_mismatches_are_listed_in_one_message(tmp_path: Path) -> None:
    weights = random_network(classes=3).state_dict()
    del weights["conv1.weight"]
    weights["linear.bias"] = weights.pop("bn1.bias")
    torch.save(weights, tmp_path / "a.pt")
    filled = random_network(classes=5)
    before = copy.deepcopy(filled)
    with pytest.raises(ValueError, match="does not fit ResNet") as caught:
        from_checkpoint(filled, tmp_path / "a.pt")
    message = str(caught.value)
    for part in (
        repr(str(tmp_path / "a.pt")),
        "missing: conv1.weight, bn1.bias;",
        "unexpected: linear.bias;",
        "of another shape: fc.weight is (3, 4) in the file and (5, 4) in the network, fc.bias is (3,) in the file",
        "rename={",
    ):
        assert part in message
    assert "\n" not in message
    assert have_equal_weights(filled, before)


def test_long_lists_of_mismatches_are_truncated(tmp_path: Path) -> None:
    torch.save(random_network().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"does not fit WideResNet \(missing: .* and \d+ more; ") as caught:
        from_checkpoint(wrn_16_2(), tmp_path / "a.pt")
    assert len(str(caught.value)) < 2000


def test_replace_head_keeps_all_other_weights() -> None:
    changed = random_network(classes=3)
    set_data_config(changed, DataConfig.of(**STATISTICS))
    before, kept = copy.deepcopy(changed), changed.conv1
    assert replace_head(changed, num_classes=7) is changed
    assert changed.eval()(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    assert changed.conv1 is kept
    old, new = before.state_dict(), changed.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("fc."))
    assert data_config(changed) == DataConfig.of(STATISTICS["mean"], STATISTICS["std"], classes=None)
    assert data_config(replace_head(random_network(), num_classes=2)) == DataConfig()


def test_the_head_is_the_last_linear_layer_of_any_network() -> None:
    body = nn.Linear(4, 4)
    head = nn.Sequential(nn.ReLU(), nn.Linear(4, 3, bias=False).double())
    changed = replace_head(nn.Sequential(body, head), num_classes=5)
    assert changed.get_submodule("0") is body
    new = changed.get_submodule("1.1")
    assert isinstance(new, nn.Linear)
    assert (new.weight.shape, new.weight.dtype, new.bias) == ((5, 4), torch.float64, None)


def test_the_head_can_be_named_where_it_is_not_found() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 11 * 11, 10))  # of a size not tried
    with pytest.raises(UserError, match=r"not found; name it with layer= .* \(the last are 0\), or build"):
        replace_head(nn.Sequential(nn.Conv2d(3, 8, 3)), 5)
    with pytest.raises(UserError, match=r"^Sequential has no layer 'fc' to replace; choose from: 0, 2\.$"):
        replace_head(network, 5, layer="fc")
    assert replace_head(network, 5, layer="2")(torch.rand(2, 3, 13, 13)).shape == (2, 5)


def test_a_file_for_other_classes_is_one_sentence(tmp_path: Path) -> None:
    torch.save(random_network(classes=3).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt' has weights for 3 classes and ResNet was built for 5; name a file"):
        from_checkpoint(random_network(classes=5), tmp_path / "a.pt")


def test_the_average_of_the_weights_is_loaded_from_a_run_that_has_one(tmp_path: Path) -> None:
    average, current = random_network(), random_network()
    states = [{f"network.{key}": value for key, value in one.state_dict().items()} for one in (average, current)]
    content = {"pytorch-lightning_version": "2.6", "state_dict": states[0], "current_model_state": states[1]}
    torch.save(content, tmp_path / "best.ckpt")
    assert have_equal_weights(from_checkpoint(random_network(), tmp_path / "best.ckpt"), average)


def test_replace_head_refuses_networks_without_a_linear_layer_and_zero_classes() -> None:
    with pytest.raises(ValueError, match=r"^Sequential has no linear layer to replace; build it with the number of cl"):
        replace_head(nn.Sequential(nn.ReLU()), num_classes=2)
    with pytest.raises(ValueError, match=r"^num_classes must be >= 1, got 0\.$"):
        replace_head(random_network(), num_classes=0)


def flip_bit(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Wrapped(nn.Module):
    """A network whose submodules are named like prefixes that are dropped in other files."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)
        self.module = nn.Linear(2, 2)


def test_submodules_named_like_dropped_prefixes_are_kept(tmp_path: Path) -> None:
    saved = Wrapped()
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    loaded = from_checkpoint(Wrapped(), tmp_path / "weights.pt")
    for key, value in saved.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


def test_keys_that_become_equal_without_prefixes_are_refused(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.zeros(2, 2), "network.weight": torch.ones(2, 2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="become the same"):
        from_checkpoint(nn.Linear(2, 2, bias=False), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"colour": 1}, r"'data_config' in .* must contain only mean, std, classes, preparation, train_size"),
        (
            {"preparation": {"colour": 1}},
            r"'data_config' in .* must contain only mean, std, classes, preparation, train_size",
        ),
        ({"preparation": {"size": "large"}}, r"^A size must be a number of pixels, .* got 'large'\.$"),
    ],
)
def test_an_invalid_data_config_is_refused_before_weights_change(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "data_config": config}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        from_checkpoint(network, tmp_path / "weights.pt")
    assert torch.equal(network.weight, before)


def test_a_file_with_several_sets_of_weights_says_which_is_loaded(tmp_path: Path) -> None:
    plain, averaged = random_network().state_dict(), random_network().state_dict()
    saved = {"epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}, "state_dict": plain, "state_dict_ema": averaged}
    torch.save(saved, tmp_path / "timm.pth")
    with pytest.warns(UserWarning, match="under 'state_dict', which are loaded, and under 'state_dict_ema'; choose"):
        loaded = from_checkpoint(random_network(), tmp_path / "timm.pth")
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())
    loaded = from_checkpoint(random_network(), tmp_path / "timm.pth", entry="state_dict_ema")
    assert all(torch.equal(value, averaged[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(UserError, match="no weights under 'ema'; choose from: 'state_dict', 'state_dict_ema'"):
        from_checkpoint(random_network(), tmp_path / "timm.pth", entry="ema")


def test_an_unusual_entry_is_loaded_if_it_is_the_only_one(tmp_path: Path) -> None:
    weights = random_network().state_dict()
    torch.save({"epoch": 3, "net": weights}, tmp_path / "one.pth")
    loaded = from_checkpoint(random_network(), tmp_path / "one.pth")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    torch.save({"student": weights, "teacher": weights}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="has weights under 'student', 'teacher'; choose one of them with entry="):
        from_checkpoint(random_network(), tmp_path / "two.pth")
