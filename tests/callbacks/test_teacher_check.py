from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks.teacher_check import accuracy_on_val, describe_chance_level


@pytest.mark.parametrize(("right", "count", "classes"), [(36, 360, 10), (0, 100, 10), (55, 100, 2)])
def test_a_teacher_at_chance_level_is_described(right: int, count: int, classes: int) -> None:
    reason, certain = describe_chance_level(right, count, classes)
    assert certain
    assert f"classifies {right} of {count} validation images correctly" in reason
    assert f"no better than chance ({1 / classes:.1%})" in reason
    assert "teacher_check='off'" in reason
    assert reason.count(". ") == 0  # one sentence


@pytest.mark.parametrize(("right", "count", "classes"), [(60, 360, 10), (100, 100, 10), (70, 100, 2), (5, 100, 100)])
def test_a_teacher_above_chance_level_is_not_described(right: int, count: int, classes: int) -> None:
    assert describe_chance_level(right, count, classes) == ("", False)


@pytest.mark.parametrize(("right", "count", "classes"), [(2, 2, 2), (1, 1, 2), (3, 4, 2), (1, 2, 2), (0, 1, 10)])
def test_with_few_images_the_result_is_uncertain(right: int, count: int, classes: int) -> None:
    reason, certain = describe_chance_level(right, count, classes)
    assert not certain
    assert f"classifies {right} of {count} validation images correctly, too few images to decide whether" in reason


def test_a_teacher_on_few_images_is_used_with_a_warning(small: Callable[..., nn.Module]) -> None:
    images = torch.rand(2, 1, 8, 8)
    teacher = small(num_classes=2)
    labels = teacher.eval()(images).argmax(1)
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options)
    with pytest.warns(UserWarning, match="The teacher classifies 2 of 2 validation images correctly, too few images"):
        trainer.fit(DistillationModule(small(num_classes=2), teacher), loader, loader)


def test_the_description_has_the_confidence_interval() -> None:
    assert "36 of 360 validation images correctly (7.3% to 13.5%)" in str(describe_chance_level(36, 360, 10))


class RecordAccuracy(pl.Callback):
    """Records the accuracy on the validation images at the start of training."""

    def __init__(self) -> None:
        self.accuracies: list[tuple[int, int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def classify(images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return pl_module(images)

        was_training = pl_module.training
        pl_module.eval()
        self.accuracies.append(accuracy_on_val(trainer, classify))
        pl_module.train(was_training)


@pytest.mark.parametrize("sanity", [0, 1])
def test_all_validation_images_are_evaluated(
    small: Callable[..., nn.Module], make_trainer: Callable[..., pl.Trainer], sanity: int
) -> None:
    data, record = DigitsDataModule(batch_size=128), RecordAccuracy()
    network = small().eval()
    right = count = 0
    for stored in data.val_dataloader():
        images, labels, *_ = data.augment(stored)
        right += int((network(images).argmax(1) == labels).sum())
        count += len(labels)
    trainer = make_trainer(callbacks=[record], num_sanity_val_steps=sanity, limit_train_batches=1)
    trainer.fit(TeacherModule(network.train()), data)
    assert count == len(data.splits.val_samples) > 128
    assert record.accuracies == [(right, count)]


def accuracy_with_plain_loaders(
    make_trainer: Callable[..., pl.Trainer], val: Any, **options: Any
) -> list[tuple[int, int]]:
    record = RecordAccuracy()
    train = DataLoader(TensorDataset(torch.rand(8, 1, 2, 2), torch.arange(8) % 3), batch_size=4)
    trainer = make_trainer(callbacks=[record], num_sanity_val_steps=0, limit_train_batches=1, **options)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # always predicts 1
    trainer.fit(TeacherModule(nn.Sequential(nn.Flatten(), layer)), train, val)
    return record.accuracies


def loader(labels: list[int], batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(len(labels), 1, 2, 2), torch.tensor(labels)), batch_size=batch_size)


plain_loaders = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


@pytest.mark.filterwarnings("ignore:The network Sequential returns probabilities")
@plain_loaders
def test_unlabelled_images_are_not_counted(make_trainer: Callable[..., pl.Trainer]) -> None:
    assert accuracy_with_plain_loaders(make_trainer, loader([1, -1, 0, 1, -1])) == [(2, 3)]
    assert accuracy_with_plain_loaders(make_trainer, loader([-1, -1])) == [(0, 0)]


@pytest.mark.filterwarnings("ignore:The network Sequential returns probabilities")
@plain_loaders
def test_several_validation_loaders_and_limit_val_batches(make_trainer: Callable[..., pl.Trainer]) -> None:
    loaders = [loader([1, 1, 0]), loader([0, 0, 1, 1, 1])]
    assert accuracy_with_plain_loaders(make_trainer, loaders) == [(5, 8)]
    assert accuracy_with_plain_loaders(make_trainer, loaders, limit_val_batches=1) == [(2, 4)]


@pytest.mark.filterwarnings("ignore:The network Sequential returns probabilities")
@plain_loaders
@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")
def test_without_a_validation_loader_no_image_is_counted(make_trainer: Callable[..., pl.Trainer]) -> None:
    assert accuracy_with_plain_loaders(make_trainer, None) == [(0, 0)]
