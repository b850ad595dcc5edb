from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from torch import nn

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.losses import HintLoss
from kd_lightning.networks import (
    DataConfig,
    ResNet,
    data_config,
    from_checkpoint,
    resnet20,
    resnet32x4,
    reuse_teacher_classifier,
    set_data_config,
)


def test_reusing_a_classifier_adds_a_projector_and_freezes_the_classifier() -> None:
    backbone, teacher = resnet20(), resnet32x4()
    before = sum(weight.numel() for weight in backbone.parameters()) - 64 * 10 - 10
    student = reuse_teacher_classifier(backbone, teacher)
    projector = 64 * 128 + 128 * 128 * 9 + 128 * 256 + 2 * (128 + 128 + 256)
    assert sum(weight.numel() for weight in student.parameters()) == before + projector + 256 * 10 + 10
    assert torch.equal(student.fc.weight, teacher.fc.weight)  # type: ignore[union-attr, arg-type]
    assert student.fc is not teacher.fc
    frozen = [name for name, weight in student.named_parameters() if not weight.requires_grad]
    assert frozen == ["fc.weight", "fc.bias"]
    assert all(weight.requires_grad for weight in teacher.parameters())
    assert student(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_logits_are_the_classifiers_on_the_projected_maps() -> None:
    teacher = resnet32x4().eval()
    student = reuse_teacher_classifier(resnet20(), teacher).eval()
    seen: list[torch.Tensor] = []
    student.get_submodule("avgpool.projector").register_forward_hook(lambda *a: seen.append(a[-1]))
    logits = student(torch.rand(2, 3, 32, 32))
    assert seen[0].shape == (2, 256, 8, 8)
    torch.testing.assert_close(logits, teacher.fc(seen[0].mean((2, 3))))  # type: ignore[operator]


@pytest.mark.parametrize("reduction", [1, 2, 1000])
def test_linear_layers_and_torchvision_networks_are_accepted(reduction: int) -> None:
    student = reuse_teacher_classifier(
        torchvision.models.resnet18(num_classes=7), nn.Linear(24, 5), reduction=reduction
    )
    assert student(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_classes_come_from_the_classifier_and_statistics_from_the_backbone() -> None:
    backbone, teacher = resnet20(), resnet32x4()
    set_data_config(backbone, DataConfig.of([0.5] * 3, [0.2] * 3, "abcdefghij"))
    set_data_config(teacher, DataConfig.of([0.1] * 3, [0.3] * 3, "klmnopqrst"))
    assert data_config(reuse_teacher_classifier(backbone, teacher)) == DataConfig.of([0.5] * 3, [0.2] * 3, "klmnopqrst")


def test_networks_without_the_needed_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^ResNet has no layer 'pool'; name the layer.*: conv1, .*avgpool, fc\.$"):
        reuse_teacher_classifier(resnet20(), resnet32x4(), pool="pool")
    with pytest.raises(ValueError, match=r"^Conv2d has no linear layer"):
        reuse_teacher_classifier(resnet20(), nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="has no linear layer"):
        reuse_teacher_classifier(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1)), nn.Linear(3, 2), pool="1")


def test_a_student_is_trained_saved_and_loaded(
    small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    """SimKD from end to end: the classifier stays, the projector is trained, the checkpoint contains both."""
    teacher, data = small(8), DigitsDataModule(batch_size=256)
    student = reuse_teacher_classifier(small(), teacher)
    loss = HintLoss(weight=1.0, student_layers=["avgpool.projector"], teacher_layers=["layer2"], regressor=False)
    module = DistillationModule(student, teacher, losses={"hint": loss}, teacher_check="off")
    projector = student.state_dict()["avgpool.projector.0.weight"].clone()
    trainer = make_trainer(max_epochs=3)
    trainer.fit(module, data)
    assert torch.equal(student.fc.weight, teacher.fc.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(student.state_dict()["avgpool.projector.0.weight"], projector)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    again = from_checkpoint(reuse_teacher_classifier(small(), nn.Linear(16, 10)), tmp_path / "student.ckpt")
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(again.eval()(images), student.eval()(images))
