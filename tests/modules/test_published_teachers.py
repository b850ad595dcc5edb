"""A teacher of timm sees in evaluation what timm itself would show it, whatever the student's images are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from made_photographs import photograph
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

from kd_lightning import DistillationModule, ImageFolderDataModule
from kd_lightning.data.batch import images_for_teacher
from kd_lightning.networks import ResNet, data_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 8), ("test", 4)):
        for number, name in enumerate(("ant", "bee")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = photograph(40 + 11 * i, 95 - 9 * i, seed=100 * number + i)
                image.save(folder / split / name / f"{i}.png")
    return folder


def trained(**published: Any) -> nn.Module:
    """A network of timm whose weights are not random, with changes of its published configuration."""
    network: nn.Module = timm.create_model("resnet10t", num_classes=2, pretrained_cfg_overlay=published)
    network.train()
    for _ in range(3):
        network(torch.randn(8, 3, 48, 48))
    return network.eval()


@pytest.mark.parametrize(
    "published",
    [
        {"test_input_size": (3, 64, 64), "crop_pct": 0.8, "test_crop_pct": 0.9},
        {"test_input_size": (3, 56, 56), "crop_mode": "squash", "interpolation": "bilinear"},
        {"test_input_size": (3, 56, 56), "crop_mode": "border", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
        {"test_input_size": (3, 48, 64), "test_crop_pct": 1.0},
    ],
)
@pytest.mark.parametrize("options", [{}, {"image_size": 24}, {"image_size": 24, "mean": [0.4] * 3, "std": [0.2] * 3}])
def test_the_teacher_sees_the_images_of_its_own_transform(
    root: Path, make_trainer: Callable[..., pl.Trainer], published: dict[str, Any], options: dict[str, Any]
) -> None:
    teacher = trained(**published)
    data = ImageFolderDataModule(str(root), batch_size=8, val_fraction=0.25, **options)
    module = DistillationModule(ResNet([1], [8], num_classes=2), teacher, teacher_check="off")
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    transform: Any = create_transform(**resolve_data_config(model=teacher, use_test_size=True))
    assert module.frozen_teacher is not None
    seen = 0
    for raw in data.test_dataloader():
        batch = data.augment(raw)
        logits = module.frozen_teacher(images_for_teacher(batch)).logits
        for sample, shown in zip(batch.ids.tolist(), logits, strict=True):
            with Image.open(data.image_name("test", sample)) as image, torch.no_grad():
                expected = teacher(transform(image)[None])[0]
            torch.testing.assert_close(shown, expected, atol=1e-4, rtol=1e-4)
            seen += 1
    assert seen == 8
    kept = data_config(module.student)
    assert kept.preparation == data.preparation
    assert kept.classes == ("ant", "bee")
    own = data_config(teacher).preparation
    assert own is not None
    assert batch.images.shape[2:] == ((24, 24) if options else own.size)
