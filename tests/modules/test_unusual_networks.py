"""Unusual networks of users, as teacher and as student."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
from mostly_slow import mostly_slow
from on_other_device import on_other_device
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from unusual_networks import Complex, Counting, Pair, Probabilities, Viewing, WithAuxiliary

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.errors import UserError
from kd_lightning.losses import HardTargetLoss, HintLoss
from kd_lightning.networks import ResNet
from kd_lightning.networks.memory_format import contiguous

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


def _with_old_weight_norm() -> nn.Module:
    network = Viewing()
    network.fc = torch.nn.utils.weight_norm(network.fc)
    network(torch.rand(2, 1, 8, 8))
    return network


def _dynamic_int8() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear})


def _static_int8() -> nn.Module:
    quantization = torch.ao.quantization
    layers = [quantization.QuantStub(), nn.Conv2d(1, 8, 3), nn.ReLU(), quantization.DeQuantStub(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(8 * 36, 10)).eval()
    network.qconfig = quantization.get_default_qconfig("x86")
    network[5].qconfig = None  # type: ignore[assignment]
    quantization.prepare(network, inplace=True)
    network(torch.randn(8, 1, 8, 8))
    return quantization.convert(network)


def _scripted() -> nn.Module:
    with torch.no_grad():
        return torch.jit.script(Viewing())


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "view": Viewing,
    "old weight_norm": _with_old_weight_norm,
    "complex": Complex,
    "auxiliary": WithAuxiliary,
    "compiled": lambda: torch.compile(Viewing(), backend="eager"),  # type: ignore[dict-item, return-value]
    "TorchScript": _scripted,
    "counting": Counting,
    "dynamic int8": _dynamic_int8,
    "static int8": _static_int8,
    "half": lambda: Viewing().half(),
}
IGNORED = [
    "ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning",
    "ignore:.*torch.jit.script.*is deprecated",
    "ignore:.*(torch.ao.quantization is|creation functions that produce tensors with|TypedStorage is) deprecated",
    "ignore:.*has auxiliary classifiers:UserWarning",
    "ignore:.*quantized tensor creation functions",
    "ignore:.*reduce_range will be deprecated",
]


@pytest.fixture
def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=64)


def with_deprecated_torch(test: Callable[..., None]) -> Callable[..., None]:
    """Ignore warnings about deprecated features of torch."""
    for text in IGNORED:
        test = pytest.mark.filterwarnings(text)(test)
    return test


@with_deprecated_torch
@pytest.mark.parametrize("precision", mostly_slow(["32-true", "bf16-mixed"], "bf16-mixed"))
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_teacher_trains_a_student_and_does_not_change(
    kind: str, precision: Any, small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    teacher = BUILDERS[kind]()
    module = DistillationModule(small(), teacher, teacher_check="off")
    assert module.teacher is not None
    before = {name: copy.deepcopy(value) for name, value in module.teacher.state_dict().items()}
    trainer = make_trainer(max_epochs=1, limit_train_batches=2, precision=precision)
    trainer.fit(module, digits)
    trainer.test(module, digits)
    for name, value in module.teacher.state_dict().items():
        if isinstance(value, torch.Tensor) and not value.is_quantized:
            assert torch.equal(value, before[name]), name


@with_deprecated_torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile hides it
@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if "int8" not in kind and kind != "half"])
def test_a_student_trains_and_its_state_dict_has_plain_keys(
    kind: str, small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    network = BUILDERS[kind]()
    module = DistillationModule(network, small(), teacher_check="off")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(max_epochs=1, limit_train_batches=2)
    trainer.fit(module, digits)
    trainer.test(module, digits)
    assert not any("_orig_mod" in name for name in before)
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_network_that_needs_contiguous_maps_is_not_run_channels_last(digits: DigitsDataModule) -> None:
    """As student and as teacher; other networks are run channels-last."""
    for network, channels_last in (
        (Viewing(), False),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)), True),
    ):
        plain = copy.deepcopy(network).eval()
        module = DistillationModule(network, network, teacher_check="off")
        trainer = pl.Trainer(logger=False, accelerator="cpu", limit_test_batches=1, enable_progress_bar=False)
        trainer.test(module, digits, verbose=False)
        assert module.frozen_teacher is not None
        inputs = (module.convert_input, module.frozen_teacher.convert_input)
        assert [each.channels_last for each in inputs] == [channels_last, channels_last]
        images = torch.rand(3, 1, 8, 8).to(memory_format=torch.channels_last)
        torch.testing.assert_close(module.eval()(images), plain(contiguous(images)))


@on_other_device
def test_a_network_that_needs_contiguous_maps_trains_on_another_device() -> None:
    module = DistillationModule(Viewing(), Counting(), teacher_check="off")
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, **options).fit(module, DigitsDataModule())


def test_outputs_that_are_not_logits_are_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    for module in (DistillationModule(small(), Pair()), TeacherModule(Pair())):
        with pytest.raises(UserError, match="Pair returns a tuple and not only its logits; wrap it in a network that"):
            make_trainer().fit(module, digits)


def test_probabilities_in_place_of_logits_give_a_warning(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    with pytest.warns(UserWarning, match="The teacher returns probabilities and not logits; remove its softmax"):
        make_trainer().fit(DistillationModule(small(), Probabilities(), teacher_check="off"), digits)
    with pytest.warns(UserWarning, match="The network Probabilities returns probabilities"):
        make_trainer().fit(TeacherModule(Probabilities()), digits)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_of_another_type_than_the_precision_are_refused(
    precision: Any, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    with pytest.raises(UserError, match=f"of Viewing are float16 and the Trainer's precision is {precision}; conv"):
        make_trainer(precision=precision).fit(TeacherModule(Viewing().half()), digits)


@pytest.mark.parametrize(
    ("build", "size", "message"),
    [
        (
            lambda: timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=1),
            32,
            r"^The teacher fails for float32 images of shape \(3, 32, 32\) \(Input height \(32\) doesn't match model",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 900, 10).half()),
            32,
            r"^The teacher fails for float32 .*; its weights are float16 and float32, convert all of them with",
        ),
        (
            lambda: torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last),
            None,
            r"^The teacher fails for float32 images of shape \(1, 8, 8\) .*; compare the number of channels and",
        ),
    ],
)
def test_a_failing_forward_is_explained(
    build: Callable[[], nn.Module], size: int | None, message: str, make_trainer: Trainers
) -> None:
    images = torch.rand(4, 1, 8, 8) if size is None else torch.rand(4, 3, size, size)
    student = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(images.shape[1], 10))
    loader = DataLoader(TensorDataset(images, torch.arange(4)), batch_size=2)
    with pytest.raises(UserError, match=message):
        make_trainer().fit(DistillationModule(student, build(), teacher_check="off"), loader, loader)


def test_hooks_are_removed_with_the_module_that_reads_the_layer(small: Networks) -> None:
    student, teacher = small(), small()

    def build_module() -> DistillationModule:
        hint = HintLoss(student_layers=["layer1"], teacher_layers=["layer1"])
        return DistillationModule(student, teacher, losses={"hard": HardTargetLoss(), "hint": hint})

    def hooks() -> int:
        while gc.collect():
            pass
        return len(student.get_submodule("layer1")._forward_hooks)

    for _ in range(3):
        build_module()
    assert hooks() == 0
    module = build_module()
    assert hooks() == 1
    assert module.network is student
