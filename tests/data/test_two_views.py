"""Two views of each training image in a batch: rows, labels and ids, and losses and caches that read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from made_photographs import photograph
from reading import in_epoch, in_memory, on_rank
from torch import Tensor

from kd_lightning import (
    Augmentation,
    DigitsDataModule,
    DistillationModule,
    DomainPairDataModule,
    ImageFolderDataModule,
    TeacherModule,
)
from kd_lightning.data import Batch, ImageDataModule
from kd_lightning.data.augmentation.two_views import second_seed
from kd_lightning.losses import DistillationLoss, HardTargetLoss, MLLDLoss, SKDLoss
from kd_lightning.networks import ResNet

WEAK = Augmentation(preset="light")
STRONG = Augmentation(preset="light", trivial_augment=True, erasing=0.5)


def digits(**options: Any) -> DigitsDataModule:
    defaults: dict[str, Any] = {"batch_size": 60, "augmentation": WEAK, "second_view": STRONG}
    return DigitsDataModule(**(defaults | options))


def batches(data: ImageDataModule, epoch: int) -> list[Batch]:
    return [data.augment(batch) for batch in in_epoch(data.train_dataloader(), epoch)]


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_rows_are_those_of_one_augmentation_and_then_of_the_other(epoch: int, num_workers: int) -> None:
    both = batches(digits(num_workers=num_workers), epoch)
    weak = batches(digits(second_view=None), epoch)
    strong = batches(digits(augmentation=STRONG, second_view=None, view_seed=second_seed(0)), epoch)
    for batch, first, second in zip(both, weak, strong, strict=True):
        assert batch.images.shape == (120, 1, 8, 8)
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.labels, torch.cat([first.labels, second.labels]))
    assert not torch.equal(both[0].images[:60], both[0].images[60:])


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("teacher_size", [None, 24])
def test_photographs_are_read_once_and_cut_twice(
    cuts: bool, teacher_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        file = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(40 + number, 60 - number, seed=number).save(file)
    weak = Augmentation(resized_crop=cuts, crop_scale=(0.5, 1.0) if cuts else None, flip=True)
    strong = Augmentation(resized_crop=cuts, crop_scale=(0.1, 0.4) if cuts else None, flip=True, brightness=0.5)

    def photographs(first: Augmentation, second: Augmentation | None, view_seed: int = 0) -> ImageFolderDataModule:
        options: dict[str, Any] = {"image_size": 16, "teacher_size": teacher_size, "val_fraction": 0.2}
        data = ImageFolderDataModule(
            str(tmp_path),
            batch_size=5,
            augmentation=first,
            second_view=second,
            view_seed=view_seed,
            **options,
        )
        data.follow_networks({})
        return data

    (both,) = batches(photographs(weak, strong), 1)[:1]
    (first,), (second,) = (
        batches(photographs(augmentation, None, seed), 1)[:1]
        for augmentation, seed in ((weak, 0), (strong, second_seed(0)))
    )
    assert torch.equal(both.images, torch.cat([first.images, second.images]))
    assert torch.equal(both.labels, torch.cat([first.labels, second.labels]))
    if teacher_size is None:
        assert both.teacher_images is None
    else:
        assert both.teacher_images is not None
        assert first.teacher_images is not None
        assert second.teacher_images is not None
        assert both.teacher_images.shape == (10, 3, 24, 24)
        assert torch.equal(both.teacher_images, torch.cat([first.teacher_images, second.teacher_images]))


def test_equal_augmentations_are_drawn_apart() -> None:
    batch = batches(digits(second_view=WEAK), 0)[0]
    first, second = batch.images.chunk(2)
    assert (first != second).flatten(1).any(1).float().mean() > 0.5  # one of nine crops and a flip by chance


@pytest.mark.parametrize("views", [None, 1, 3])
def test_each_row_has_the_id_of_its_view(views: int | None) -> None:
    data = digits(views=views)
    labels, count = in_memory(data.load("train")).labels, views or 1
    for epoch in (0, 2, 4):
        for batch in batches(data, epoch):
            samples, views_of_rows = batch.ids // (2 * count), batch.ids % (2 * count)
            first, second = views_of_rows.chunk(2)
            shown = epoch % views if views else 0
            assert (first == shown).all()
            assert (second == count + shown).all()
            assert torch.equal(samples[:60], samples[60:])
            assert torch.equal(labels[samples], batch.labels)


def by_id(data: ImageDataModule, epoch: int) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for batch in batches(data, epoch):
        found.update(zip(batch.ids.tolist(), batch.images, strict=True))
    return found


def test_views_do_not_depend_on_the_batch_the_order_or_the_rank() -> None:
    expected = by_id(digits(views=2), 1)
    for other in (digits(views=2, batch_size=32), digits(views=2, seed=5), on_rank(digits(views=2), 3, 2)):
        found = by_id(other, 3)
        shared = expected.keys() & found.keys()
        assert len(shared) > 500
        assert all(torch.equal(expected[name], found[name]) for name in shared)


def test_evaluation_has_one_view() -> None:
    two, one = digits(), digits(second_view=None)
    for split in ("val", "test", "plain_train"):
        ours, theirs = (next(iter(getattr(data, f"{split}_dataloader")())) for data in (two, one))
        assert torch.equal(two.augment(ours).images, one.augment(theirs).images)
        assert torch.equal(two.augment(ours).ids, one.augment(theirs).ids)


def test_the_second_view_is_part_of_the_fingerprint_and_saved() -> None:
    data = digits(views=2)
    assert "second_view" in data.fingerprint()
    assert data.fingerprint() != digits(views=2, second_view=WEAK).fingerprint()
    assert "second_view" not in digits(views=2, second_view=None).fingerprint()
    again = DigitsDataModule(**data.hparams)
    assert again.second_view == data.second_view
    assert (again.views_in_batch, DigitsDataModule().views_in_batch) == (2, 1)


def losses() -> dict[str, DistillationLoss]:
    return {"hard": HardTargetLoss(weight=0.1), "levels": MLLDLoss(two_views=True), "streamlined": SKDLoss()}


class Record(pl.Callback):
    """Keeps what the teacher says of each id, and the loss of each step."""

    def __init__(self) -> None:
        self.said: dict[int, Tensor] = {}
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        logits = pl_module.frozen_teacher(batch.images, batch.ids).logits
        self.said.update(zip(batch.ids.tolist(), logits, strict=True))
        self.losses.append(float(outputs["loss"].detach()))


def test_a_cache_has_a_row_for_each_view(
    small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    records = []
    for cache in (False, True, str(tmp_path / "logits")):
        torch.manual_seed(0)
        module = DistillationModule(small(), small(8), losses=losses(), teacher_check="off", teacher_cache=cache)
        records.append(Record())
        trainer = make_trainer(callbacks=[records[-1]], max_epochs=3, limit_train_batches=4, limit_val_batches=0)
        trainer.fit(module, digits(views=2))
    direct, *cached = records
    for record in cached:
        assert record.said.keys() == direct.said.keys()
        for name, logits in direct.said.items():
            torch.testing.assert_close(record.said[name], logits, rtol=1e-2, atol=1e-2)
        assert record.losses == pytest.approx(direct.losses, rel=1e-2)


def test_a_module_without_a_teacher_learns_from_both_views(
    small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer]
) -> None:
    trainer = make_trainer(limit_train_batches=3, limit_val_batches=1)
    trainer.fit(TeacherModule(small()), digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augmentation": Augmentation(mixup=0.2)},
            "have the same label, but augmentation mixes images and labels; set",
        ),
        ({"second_view": Augmentation(cutmix=1.0)}, "but second_view mixes images and labels"),
        (
            {"second_view": Augmentation(preset="standard")},
            "one of augmentation and second_view has resized_crop and the other does not",
        ),
        ({"second_view": Augmentation(saturation=0.2)}, "saturation"),
        ({"second_view": {"paddings": 4}}, "There is no augmentation 'paddings'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**options)


def test_a_pair_of_domains_has_one_view() -> None:
    with pytest.raises(ValueError, match="has one view of each image in a batch; set second_view to null"):
        DomainPairDataModule(digits(), DigitsDataModule())
