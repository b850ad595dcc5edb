"""Weights from files: every published spelling is read, and no damaged or dangerous file is believed."""

import copy
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kd_lightning.networks import (
    DataConfig,
    ResNet,
    data_config,
    from_checkpoint,
    read_checkpoint,
    replace_head,
    resnet20,
    set_data_config,
    wrn_16_2,
)

STATISTICS: dict[str, Any] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classes": ["ant", "bee", "cat"]}


def network(classes: int = 3) -> ResNet:
    built = ResNet([1, 1], [2, 4], num_classes=classes)
    for tensor in built.state_dict().values():  # so that no two are the same, batch norms included
        tensor.copy_(torch.rand(tensor.shape) * 100)
    return built


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def spelled(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return OrderedDict((prefix + key, value) for key, value in weights.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda weights: {"model": weights, "best": 0.9},
        lambda weights: spelled(weights, "module."),
        lambda weights: {"model": spelled(weights, "module.")},
        lambda weights: spelled(weights, "_orig_mod."),
        lambda weights: {"state_dict": spelled(weights, "network.")},
        lambda weights: {"state_dict": spelled(weights, "network._orig_mod.")},
    ],
    ids=["bare", "state_dict", "model", "module", "model.module", "compiled", "network", "network compiled"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_spelling_is_read(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any], zipped: bool) -> None:
    saved, filled = network(), network()
    torch.save(wrap(saved.state_dict()), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert from_checkpoint(filled, tmp_path / "a.pt") is filled
    assert same(filled, saved)
    assert data_config(filled) == DataConfig()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".th", ".bin"])
def test_the_suffix_and_the_type_of_the_path_do_not_matter(tmp_path: Path, suffix: str) -> None:
    saved = network()
    torch.save(saved.state_dict(), tmp_path / f"a{suffix}")
    assert same(from_checkpoint(network(), str(tmp_path / f"a{suffix}")), saved)


def test_of_a_lightning_file_only_the_network_is_read(tmp_path: Path) -> None:
    saved, filled = network(), network()
    weights = spelled(saved.state_dict(), "network.")
    weights |= {"losses.hint.regressor.weight": torch.rand(3, 3), "conv1.weight": torch.rand(7)}
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": weights}, tmp_path / "a.ckpt")
    assert same(from_checkpoint(filled, tmp_path / "a.ckpt"), saved)


def test_what_a_foreign_file_holds_beside_the_network_is_not_dropped_in_silence(tmp_path: Path) -> None:
    weights = spelled(network().state_dict(), "network.") | {"head.weight": torch.rand(3, 3)}
    torch.save({"state_dict": weights}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"unexpected: head\.weight"):
        from_checkpoint(network(), tmp_path / "a.pt")


def test_safetensors_are_read(tmp_path: Path) -> None:
    saved = network()
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "a.safetensors")
    assert same(from_checkpoint(network(), tmp_path / "a.safetensors"), saved)


def test_renaming_replaces_the_start_of_keys(tmp_path: Path) -> None:
    saved = network()
    weights = {
        key.replace("fc.", "linear.").replace("layer1.0.", "first."): value for key, value in saved.state_dict().items()
    }
    torch.save(spelled(weights, "module."), tmp_path / "a.pt")
    filled = from_checkpoint(network(), tmp_path / "a.pt", rename={"linear.": "fc.", "first.": "layer1.0."})
    assert same(filled, saved)


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
    assert same(filled, saved)
    assert data_config(filled) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None)


def test_weights_of_another_precision_are_converted(tmp_path: Path) -> None:
    saved = network()
    torch.save({key: value.half() for key, value in saved.state_dict().items()}, tmp_path / "a.pt")
    filled = network()
    from_checkpoint(filled, tmp_path / "a.pt")
    assert filled.fc.weight.dtype == torch.float32
    assert torch.equal(filled.fc.weight, saved.fc.weight.half().float())


def test_what_the_file_says_of_its_data_is_kept(tmp_path: Path) -> None:
    torch.save({"state_dict": network().state_dict(), "data_config": STATISTICS}, tmp_path / "a.pt")
    filled = from_checkpoint(network(), tmp_path / "a.pt")
    expected = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), ("ant", "bee", "cat"))
    assert data_config(filled) == expected
    assert data_config(copy.deepcopy(filled)) == expected
    assert same(copy.deepcopy(filled), filled)
    assert "data_config" not in filled.state_dict()


def test_declared_statistics_are_kept(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "foreign.pt")
    torch.save({"state_dict": network().state_dict(), "data_config": STATISTICS}, tmp_path / "ours.pt")
    declared: dict[str, Any] = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert data_config(from_checkpoint(network(), tmp_path / "foreign.pt", **declared)) == (*statistics, None)
    filled = from_checkpoint(network(), tmp_path / "ours.pt", **declared)
    assert data_config(filled) == (*statistics, ("ant", "bee", "cat"))


def deep(*blocks: int) -> ResNet:
    built = ResNet(list(blocks), [2, 4], num_classes=3)
    for tensor in built.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 100)
    return built


def test_a_student_begins_with_layers_of_a_deeper_network(tmp_path: Path) -> None:
    teacher, student = deep(3, 4), deep(2, 2)
    torch.save({"state_dict": teacher.state_dict(), "data_config": STATISTICS}, tmp_path / "teacher.pt")
    from_checkpoint(student, tmp_path / "teacher.pt", layers={"layer1.1": "layer1.2", "layer2.1": "layer2.3"})
    taken = {"layer1.0": "layer1.0", "layer1.1": "layer1.2", "layer2.0": "layer2.0", "layer2.1": "layer2.3"}
    for own, its in {**taken, "conv1": "conv1", "bn1": "bn1", "fc": "fc"}.items():
        assert same(student.get_submodule(own), teacher.get_submodule(its)), own
    assert data_config(student).mean == (0.5, 0.4, 0.3)


def test_a_deeper_network_is_refused_unless_layers_are_named(tmp_path: Path) -> None:
    torch.save(deep(3, 4).state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"unexpected: layer1\.1"):
        from_checkpoint(deep(1, 2), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"layers names 'layer7', which ResNet does not have"):
        from_checkpoint(deep(1, 2), tmp_path / "teacher.pt", layers={"layer7": "layer1.0"})
    with pytest.raises(ValueError, match=r"missing: layer1\.0\.conv1\.weight"):
        from_checkpoint(deep(1, 2), tmp_path / "teacher.pt", layers={"layer1.0": "layer1.9"})
    with pytest.raises(ValueError, match="of another shape"):
        from_checkpoint(deep(1, 2), tmp_path / "teacher.pt", layers={"layer1.0": "layer2.1"})


def test_half_of_the_statistics_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give both or neither"):
        from_checkpoint(network(), tmp_path / "none.pt", mean=[0.5])


def test_a_second_file_replaces_what_the_first_said(tmp_path: Path) -> None:
    torch.save({"state_dict": network().state_dict(), "data_config": STATISTICS}, tmp_path / "first.pt")
    torch.save(network().state_dict(), tmp_path / "second.pt")
    filled = from_checkpoint(from_checkpoint(network(), tmp_path / "first.pt"), tmp_path / "second.pt")
    assert data_config(filled) == DataConfig()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        expected = f"There is no checkpoint {str(path)!r}; check the path, or train the network first."
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(expected)}$"):
            from_checkpoint(network(), path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, zipped: bool, share: float) -> None:
    filled, path = network(), tmp_path / "a.pt"
    before = copy.deepcopy(filled)
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=f"^{re.escape(repr(str(path)))} .*(damaged|format)"):
        from_checkpoint(filled, path)
    assert same(filled, before)


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .* copy or download it again"):
        from_checkpoint(network(), path)


def test_a_flipped_bit_in_a_tensor_is_refused(tmp_path: Path) -> None:
    saved, path = network(), tmp_path / "a.pt"
    torch.save(saved.state_dict(), path)
    content = path.read_bytes()
    for name in ("conv1.weight", "bn1.running_var", "fc.bias"):
        values = saved.state_dict()[name].numpy().tobytes()
        assert content.count(values) == 1
        for bit in (0, 7, 8 * len(values) - 1):
            path.write_bytes(flipped(content, 8 * content.index(values) + bit))
            with pytest.raises(ValueError, match=r"does not match its checksum.*copy or download it again"):
                from_checkpoint(network(), path)


def test_a_record_that_one_bit_makes_a_folder_is_refused(tmp_path: Path) -> None:
    """PyTorch would return its tensor as the memory happened to be."""
    path = tmp_path / "a.pt"
    torch.save(network().state_dict(), path)
    content = path.read_bytes()
    for name in (b"a/data/0", b"a/data/7"):
        path.write_bytes(flipped(content, 8 * (content.rindex(name) - 8) + 4))
        with pytest.raises(ValueError, match="does not match its checksum or its index"):
            from_checkpoint(network(), path)


def test_a_flipped_bit_anywhere_never_gives_other_weights(tmp_path: Path) -> None:
    saved, path = network(), tmp_path / "a.pt"
    torch.save({"state_dict": saved.state_dict(), "data_config": STATISTICS}, path)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        path.write_bytes(flipped(content, draw.randrange(8 * len(content))))
        try:
            filled = from_checkpoint(network(), path)
        except ValueError:
            refused += 1
        else:
            assert same(filled, saved)
            assert data_config(filled) == DataConfig.of(**STATISTICS)
    assert refused > 50


class Payload:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, layout: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"state_dict": network().state_dict(), "extra": Payload(trace)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
        torch.load(path, weights_only=False)
    assert trace.exists()  # the payload is a live one
    trace.unlink()
    filled = network()
    before = copy.deepcopy(filled)
    with pytest.raises(ValueError, match=r"is not a checkpoint of tensors and plain data .* code, which was not run"):
        from_checkpoint(filled, path)
    assert not trace.exists()
    assert same(filled, before)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor a zip", b"\x80\x02}q\x00."])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(repr(str(path)))} .*[;,] .*\\.$"):
        from_checkpoint(network(), path)


def test_a_tensor_alone_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.rand(3), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds a Tensor and not a state dict or a checkpoint"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not contain weights, neither bare nor under 'state_dict' or 'model'"):
        from_checkpoint(network(), tmp_path / "a.pt")


def test_a_wrong_network_is_told_everything_in_one_message(tmp_path: Path) -> None:
    weights = network(classes=3).state_dict()
    del weights["conv1.weight"]
    weights["linear.bias"] = weights.pop("bn1.bias")
    torch.save(weights, tmp_path / "a.pt")
    filled = network(classes=5)
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
    assert same(filled, before)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"does not fit WideResNet \(missing: .* and \d+ more; ") as caught:
        from_checkpoint(wrn_16_2(), tmp_path / "a.pt")
    assert len(str(caught.value)) < 2000


def test_a_new_head_leaves_the_rest_alone() -> None:
    changed = network(classes=3)
    set_data_config(changed, DataConfig.of(**STATISTICS))
    before, kept = copy.deepcopy(changed), changed.conv1
    assert replace_head(changed, num_classes=7) is changed
    assert changed.eval()(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    assert changed.conv1 is kept
    old, new = before.state_dict(), changed.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("fc."))
    assert data_config(changed) == DataConfig.of(STATISTICS["mean"], STATISTICS["std"], classes=None)
    assert data_config(replace_head(network(), num_classes=2)) == DataConfig()


def test_the_head_is_the_last_linear_layer_of_any_network() -> None:
    body = nn.Linear(4, 4)
    head = nn.Sequential(nn.ReLU(), nn.Linear(4, 3, bias=False).double())
    changed = replace_head(nn.Sequential(body, head), num_classes=5)
    assert changed.get_submodule("0") is body
    new = changed.get_submodule("1.1")
    assert isinstance(new, nn.Linear)
    assert (new.weight.shape, new.weight.dtype, new.bias) == ((5, 4), torch.float64, None)


def test_a_head_needs_a_linear_layer_and_a_class() -> None:
    with pytest.raises(ValueError, match=r"^Sequential has no linear layer to replace; write its head yourself\.$"):
        replace_head(nn.Sequential(nn.Conv2d(3, 3, 1)), num_classes=2)
    with pytest.raises(ValueError, match=r"^num_classes must be >= 1, got 0\.$"):
        replace_head(network(), num_classes=0)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Wrapped(nn.Module):
    """A user's network with parts whose names are prefixes that are dropped elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)
        self.module = nn.Linear(2, 2)


def test_a_network_s_own_parts_may_be_called_like_prefixes(tmp_path: Path) -> None:
    saved = Wrapped()
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    loaded = from_checkpoint(Wrapped(), tmp_path / "weights.pt")
    for key, value in saved.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


def test_keys_that_become_the_same_are_refused(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.zeros(2, 2), "network.weight": torch.ones(2, 2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="become the same"):
        from_checkpoint(nn.Linear(2, 2, bias=False), tmp_path / "weights.pt")


def test_statistics_that_are_none_are_refused_before_a_weight_changes(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "data_config": {"colour": 1}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"'data_config' in .* must contain only mean, std and classes"):
        from_checkpoint(network, tmp_path / "weights.pt")
    assert torch.equal(network.weight, before)
