"""Quantization-aware training with 8 bits."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from resume_check import SaveAfterEachBatch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import PruneNetwork, QuantizationAwareTraining
from kd_lightning.callbacks.quantize import FakeQuantize, fake_quantize_activation, fake_quantize_weight
from kd_lightning.losses import HardTargetLoss, HintLoss, SoftTargetLoss
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


def test_weights_are_rounded_to_255_levels_per_channel() -> None:
    weight = torch.randn(5, 3, 3, 3) * torch.tensor([1e-3, 1.0, 5.0, 100.0, 0.0])[:, None, None, None]
    output = fake_quantize_weight(weight).numpy()
    scale = np.abs(weight.numpy()).reshape(5, -1).max(1)[:, None, None, None] / 127
    expected = np.rint(weight.numpy() / np.maximum(scale, 1e-12)) * scale
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-12)


def test_quantization_commutes_with_folding_a_batch_norm() -> None:
    weight, factors = torch.randn(6, 4, 3, 3), torch.rand(6, 1, 1, 1) + 0.1
    torch.testing.assert_close(fake_quantize_weight(weight * factors), fake_quantize_weight(weight) * factors)


def test_activations_are_rounded_to_256_levels_including_zero_and_clipped_values_have_no_gradient() -> None:
    images = torch.linspace(-2, 3, 1001, requires_grad=True)
    output = fake_quantize_activation(images, torch.tensor(0.5), torch.tensor(2.55))  # zero is always a level
    assert len(output.unique()) == 256
    assert (output - images.clamp(0, 2.55)).abs().max() <= 0.005001
    output.sum().backward()
    inside = (images > 0.01) & (images < 2.54)
    assert images.grad is not None
    assert (images.grad[inside] == 1).all()
    assert (images.grad[(images < -0.01) | (images > 2.57)] == 0).all()


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect")])
def test_a_layer_computes_with_quantized_weight_and_input_and_keeps_its_parameters(layer: nn.Module) -> None:
    parameters, weight = list(layer.parameters()), layer.get_parameter("weight").detach().clone()
    images = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 5, 5)
    FakeQuantize(torch.empty(0)).attach(layer)
    output = layer(images)
    output.square().sum().backward()
    assert [id(value) for value in layer.parameters()] == [id(value) for value in parameters]
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer.get_parameter("weight"), weight)
    expected = {"weight": fake_quantize_weight(weight).requires_grad_(), "bias": layer.get_parameter("bias")}
    rounded = fake_quantize_activation(images, images.min(), images.max())
    plain = copy.deepcopy(layer)
    plain._forward_pre_hooks.clear()
    plain._forward_hooks.clear()
    reference = torch.func.functional_call(plain, expected, (rounded,))
    assert torch.equal(output, reference)
    reference.square().sum().backward()
    found, gradient = layer.get_parameter("weight").grad, expected["weight"].grad
    assert found is not None
    assert gradient is not None
    assert torch.equal(found, gradient)


def test_an_error_in_forward_restores_the_parameter(recwarn: pytest.WarningsRecorder) -> None:
    layer = nn.Linear(6, 4)
    FakeQuantize(torch.empty(0)).attach(layer)
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.rand(2, 5))
    assert layer.weight is layer.get_parameter("weight")


def test_a_quantized_layer_can_be_pickled() -> None:
    layer, images = nn.Linear(6, 4), torch.rand(2, 6)
    FakeQuantize(torch.tensor([0.0, 1.0])).attach(layer.eval())
    assert torch.equal(pickle.loads(pickle.dumps(layer))(images), layer(images))


def has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_pre_hooks) or bool(layer._forward_hooks)


def fit(make_trainer: Trainers, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = make_trainer(**{"max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, DigitsDataModule(batch_size=256))
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_student_is_quantized_from_its_epoch_and_the_teacher_never(
    precision: Any, small: Networks, make_trainer: Trainers
) -> None:
    quantized: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            quantized.append(has_hooks(pl_module.network.conv1))
            assert not has_hooks(pl_module.teacher.conv1)

    losses = {"hard": HardTargetLoss(), "soft": SoftTargetLoss(), "hint": HintLoss(student_layers=["layer2"])}
    teacher = small()
    before, keys = copy.deepcopy(teacher.state_dict()), set(teacher.state_dict())
    module = DistillationModule(small(), teacher, losses=losses, teacher_check="off")
    fit(make_trainer, module, QuantizationAwareTraining(from_epoch=1), Watch(), precision=precision)
    half = len(quantized) // 2
    assert quantized == [False] * half + [True] * half
    assert set(module.network.state_dict()) == keys
    assert not has_hooks(module.network.get_submodule("conv1"))
    assert module.teacher is not None
    assert all(torch.equal(value, module.teacher.state_dict()[name]) for name, value in before.items())


def test_validation_is_quantized(small: Networks, make_trainer: Trainers) -> None:
    seen: dict[str, Tensor] = {}

    class Watch(pl.Callback):
        def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
        ) -> None:
            if not trainer.sanity_checking:
                seen["logits"], seen["images"] = pl_module(batch[0]), batch[0]

    module = TeacherModule(small())
    fit(make_trainer, module, QuantizationAwareTraining(), Watch(), max_epochs=1)
    plain = module.eval()(seen["images"])
    assert not torch.equal(plain, seen["logits"])
    torch.testing.assert_close(plain, seen["logits"], atol=0.5, rtol=0.5)


def test_an_interrupted_run_resumes_to_identical_weights(
    small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    network = small()

    def run(*callbacks: pl.Callback, path: Path | None = None) -> dict[str, Tensor]:
        module = TeacherModule(copy.deepcopy(network))
        trainer = make_trainer(max_epochs=3, callbacks=[QuantizationAwareTraining(from_epoch=1), *callbacks])
        trainer.fit(module, DigitsDataModule(batch_size=256), ckpt_path=path, weights_only=True)
        return module.state_dict()

    expected = run(SaveAfterEachBatch(tmp_path))
    resumed = run(path=tmp_path / "6.ckpt")
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_a_copied_network_quantizes_its_own_weights(small: Networks, make_trainer: Trainers) -> None:
    copies: list[nn.Module] = []

    class CopyNetwork(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            copies.append(copy.deepcopy(pl_module.network))

    fit(make_trainer, TeacherModule(small()), QuantizationAwareTraining(), CopyNetwork(), max_epochs=1)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        for weight in copies[0].parameters():
            weight.zero_()
    assert not copies[0].eval()(images).any()
    assert copies[1].eval()(images).any()


def test_incompatible_options_are_refused(small: Networks, make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="from_epoch must be >= 0"):
        QuantizationAwareTraining(from_epoch=-1)
    with pytest.raises(ValueError, match="does not support a compiled network"):
        fit(make_trainer, TeacherModule(small(), compile=True), QuantizationAwareTraining())
    with pytest.raises(ValueError, match=r"PruneNetwork prunes in epoch 1.*from_epoch=2"):
        fit(make_trainer, TeacherModule(small()), PruneNetwork(epochs=[0, 1]), QuantizationAwareTraining(from_epoch=1))


def test_a_pruned_network_can_be_quantized_afterwards(small: Networks, make_trainer: Trainers) -> None:
    module = TeacherModule(small(width=16))
    fit(make_trainer, module, PruneNetwork(keep=0.5, epochs=[0]), QuantizationAwareTraining(from_epoch=1), max_epochs=3)
    assert module.network.get_parameter("conv1.weight").shape[0] < 16
    with torch.no_grad():
        assert module.network(torch.rand(2, 1, 8, 8)).isfinite().all()
