"""Photographs of several classes: the CSV file, the splits, and the labels in each part of the pipeline."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_photographs import COLOURS, write_several_classes
from on_other_device import on_other_device
from reading import in_epoch
from test_csv_layout import FILES, data, root  # noqa: F401
from torch import Tensor

from kd_lightning import DigitsDataModule, DomainPairDataModule, ImageFolderDataModule
from kd_lightning.data import Augmentation
from kd_lightning.data.image_set import ImageSet, StreamedImages
from kd_lightning.data.kept_labels import keep_labels
from kd_lightning.data.labels import check_labels, is_labelled, stratum
from kd_lightning.data.partition import draw_partition
from kd_lightning.data.protocol import is_multi_label
from kd_lightning.data.read_batch import read_batch, read_training_batch
from kd_lightning.data.splits import stratified_split
from kd_lightning.errors import UserError

LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_several_classes(tmp_path_factory.mktemp("several"), 60, unlabelled=6)


def several(folder: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(folder), labels="labels.csv", **{"image_size": 16, "batch_size": 8, **options})


def by_name(found: ImageFolderDataModule, split: str) -> dict[str, list[float]]:
    images = found.splits.read(split)
    return {Path(images.name(i)).name: row for i, row in enumerate(images.labels.tolist())}


# --- the file


def test_a_semicolon_declares_several_classes(root: Path) -> None:  # noqa: F811
    lines = ["cat;dog", "dog", "cat", "-", "", "dog ; bird", "bird;cat;dog"]
    found = data(root, *map(",".join, zip(FILES, lines, strict=False)))
    assert (found.classes, found.multi_label, is_multi_label(found)) == (("bird", "cat", "dog"), True, True)
    labelled = found.layout.training_images()
    assert labelled.labels.dtype == torch.float32
    assert labelled.labels.tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]]
    unlabelled = found.layout.unlabelled_images()
    assert ([file.name for file in unlabelled.files], unlabelled.labels.tolist()) == (["04.png"], [[-1, -1, -1]])


def test_the_argument_declares_it_where_every_image_has_one_class(root: Path) -> None:  # noqa: F811
    (root / "labels.csv").write_text("file,label\n00.png,cat\n01.png,dog\n02.png,-\n")
    options: dict[str, Any] = {"labels": "labels.csv", "image_size": 8}
    assert not ImageFolderDataModule(str(root), **options).multi_label
    assert ImageFolderDataModule(str(root), **options).classes == ("-", "cat", "dog")  # a name like any other
    found = ImageFolderDataModule(str(root), **options, multi_label=True)
    assert (found.multi_label, found.classes) == (True, ("cat", "dog"))
    assert found.layout.training_images().labels.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert found.hparams["multi_label"] is True
    with pytest.raises(UserError, match=r"^multi_label is for labels in a CSV file, since .*; set labels, or leave"):
        ImageFolderDataModule(str(root), multi_label=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["00.png,cat;dog", "01.png,cat;"], r"^Line 3 of .* names '' among several classes, 'cat;'; correct it\.$"),
        (["00.png,cat;dog", "01.png,-;dog"], r"^Line 3 of .* names '-' among several classes, '-;dog'; correct it"),
        (["00.png,cat;dog;cat", "01.png,dog"], r"^Line 2 of .* names 'cat' twice, 'cat;dog;cat'; correct it\.$"),
        (["00.png,cat", "00.png,dog"], r"keep one of its rows, or write 'cat;dog' in one if it has both\.$"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(root: Path, lines: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(UserError, match=message):
        data(root, *lines).setup("fit")


def test_several_classes_are_refused_where_one_is_declared(root: Path) -> None:  # noqa: F811
    (root / "labels.csv").write_text("file,label\n00.png,cat\n01.png,cat;dog\n")
    with pytest.raises(UserError, match=r"^Line 3 of .*, 'cat;dog', but multi_label is false; set it to true or null"):
        ImageFolderDataModule(str(root), labels="labels.csv", multi_label=False).setup("fit")


def test_a_class_of_val_that_train_lacks_is_named(root: Path) -> None:  # noqa: F811
    lines = ["00.png,cat;dog,train", "01.png,-,val", "02.png,cat;bird,val"]
    with pytest.raises(UserError, match=r"^Line 4 of .* has the class 'bird' in 'val', which no row of 'train' has"):
        data(root, *lines, header="file,label,split").setup("fit")
    found = data(root, *lines[:2], "03.png,dog,val", header="file,label,split")
    assert by_name(found, "val") == {"01.png": [0, 0], "03.png": [0, 1]}
    with pytest.raises(
        UserError, match=r"^No image of the split 'val' in .* has a class, so there is nothing to measure"
    ):
        data(root, *lines[:2], header="file,label,split").setup("fit")
    (root / "labels.csv").write_text("file,label\n00.png,-\n01.png,\n")
    with pytest.raises(UserError, match=r"names no class of a training image, from which the classes are read; label"):
        ImageFolderDataModule(str(root), labels="labels.csv", multi_label=True).setup("fit")


# --- splits


def test_images_are_divided_by_their_rarest_class(photographs: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    found, again = several(photographs), several(photographs)
    assert found.classes == tuple(COLOURS)
    parts = {split: by_name(found, split) for split in ("train", "val", "test")}
    assert "44 images are trained on, 5 validated on and 5 tested on" in caplog.text
    assert parts == {split: by_name(again, split) for split in parts}
    assert sum(map(len, parts.values())) == 60
    assert [row for row in parts["train"].values() if row == [-1] * 3] == [[-1] * 3] * 6
    for split in ("val", "test"):
        assert (torch.tensor(list(parts[split].values())).sum(0) >= 1).all()  # even of the rarest class
    again.load_state_dict({})
    found.setup("fit")
    state = found.state_dict()
    restored = several(photographs, split_seed=9)
    restored.load_state_dict(state)
    assert {split: by_name(restored, split) for split in parts} == parts


def test_the_stratum_is_the_rarest_class() -> None:
    labels = torch.zeros(100, 3)
    labels[:, 0], labels[::2, 1], labels[::10, 2] = 1, 1, 1
    labels[95:] = 0
    labels[99] = -1
    assert stratum(labels)[[0, 1, 2, 95, 99]].tolist() == [2, 0, 1, 3, -1]
    train, val = stratified_split(labels, fraction=0.2, seed=0)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(100))
    assert 99 not in val.tolist()
    whole, part = (labels[rows].clamp(min=0).mean(0) for rows in (torch.arange(100), val))
    torch.testing.assert_close(part, whole, atol=0.03, rtol=0)
    drawn = draw_partition(labels, val_fraction=0.1, test_fraction=0.1, seed=0).parts
    assert all((labels[drawn[split], 2] == 1).sum() == 1 for split in ("val", "test"))


@pytest.mark.parametrize("per_class", [1, 3, 10])
def test_labels_are_kept_so_that_each_class_has_enough(per_class: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(200, 4, generator=generator) < torch.tensor([0.6, 0.3, 0.2, 0.08])).float()
    labels[:20] = -1
    samples = torch.arange(10, 200)
    kept = keep_labels(labels, samples, per_class=per_class, seed=1)
    assert torch.equal(kept, keep_labels(labels, samples, per_class=per_class, seed=1))
    assert not torch.equal(kept, keep_labels(labels, samples, per_class=per_class, seed=2))
    left = kept[samples]
    assert ((left > 0).sum(0) >= per_class).all()
    assert is_labelled(left).sum() <= 4 * per_class
    assert torch.equal(kept[is_labelled(kept)], labels[is_labelled(kept)])
    assert torch.equal(kept[:10], labels[:10])
    with pytest.raises(UserError, match=r"labels_per_class is 90, but class 3 has \d+ labelled training images"):
        keep_labels(labels, samples, per_class=90, seed=0)


def test_few_labels_leave_the_others_unlabelled(photographs: Path) -> None:
    few = several(photographs, labels_per_class=2)
    few.setup("fit")
    labels = few.splits["train"].labels
    assert len(labels) == 50
    assert ((labels > 0).sum(0) >= 2).all()
    assert not few.all_labelled
    assert few.has_labels("train")
    only = several(photographs, labels_per_class=2, labelled_only=True)
    assert len(only.train_samples) == is_labelled(labels).sum()


# --- batches


def test_batches_have_rows_of_zeros_and_ones_and_of_minus_one(photographs: Path) -> None:
    for options in ({}, {"augmentation": Augmentation(resized_crop=False)}):
        found = several(photographs, **options)
        found.setup("fit")
        assert isinstance(found.splits["train"], StreamedImages if not options else ImageSet)
        rows: dict[int, list[float]] = {}
        for raw in in_epoch(found.train_dataloader(), 0):
            batch = found.augment(raw)
            assert batch.labels.shape == (8, 3)
            assert batch.labels.dtype == torch.float32
            rows |= dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
        stored = found.splits["train"].labels
        assert all(stored[sample].tolist() == row for sample, row in rows.items())
        assert [0.0, 0.0, 0.0] in rows.values()
    assert not found.all_labelled


def test_a_file_of_decoded_images_gives_the_same_labels(photographs: Path, tmp_path: Path) -> None:
    in_memory, mapped = several(photographs), several(photographs, memory_limit=0, cache=str(tmp_path))
    for found in (in_memory, mapped):
        found.setup("fit")
    assert list(tmp_path.glob("*.images"))
    for one, other in zip(*(in_epoch(found.train_dataloader(), 3) for found in (in_memory, mapped)), strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.ids, other.ids)


def test_mixed_images_have_mixed_rows(photographs: Path) -> None:
    found = several(photographs, augmentation=Augmentation(mixup=1.0))
    found.setup("fit")
    stored, mixed = found.splits["train"].labels, []
    for raw in in_epoch(found.train_dataloader(), 0):
        batch = found.augment(raw)
        assert raw.plan is not None
        assert raw.plan.mixing is not None
        share = dict(zip(raw.plan.mixing.rows.tolist(), raw.plan.mixing.fraction.double() / 2**24, strict=True))
        partner = dict(zip(raw.plan.mixing.rows.tolist(), raw.plan.mixing.partners.tolist(), strict=True))
        for row, labels in enumerate(batch.labels):
            own = stored[raw.ids[row]]
            if not is_labelled(own[None]):
                assert labels.tolist() == [-1] * 3
                continue
            expected = share[row] * own + (1 - share[row]) * stored[partner[row]]
            torch.testing.assert_close(labels, expected.float())
            mixed.append(labels)
    check_labels(torch.stack(mixed), num_classes=3, multi_label=True)
    assert ((torch.stack(mixed) > 0.01) & (torch.stack(mixed) < 0.99)).any()


def test_two_views_repeat_the_labels(photographs: Path) -> None:
    found = several(photographs, second_view=Augmentation())
    found.setup("fit")
    batch = found.augment(next(iter(in_epoch(found.train_dataloader(), 0))))
    assert batch.labels.shape == (16, 3)
    assert torch.equal(batch.labels[:8], batch.labels[8:])


@on_other_device
def test_labels_follow_the_images_to_the_device(photographs: Path) -> None:
    for augmentation in (Augmentation(resized_crop=False), Augmentation(mixup=1.0)):
        found = several(photographs, augmentation=augmentation)
        found.setup("fit")
        raw = next(iter(in_epoch(found.train_dataloader(), 0)))
        moved = found.transfer_batch_to_device(raw, torch.device("other"), 0)
        batch = found.augment(moved)
        assert str(batch.labels.device) == "other:0"
        assert torch.equal(batch.labels.cpu(), found.augment(raw).labels)


def test_a_loader_resumes_within_an_epoch(photographs: Path) -> None:
    whole, resumed = several(photographs), several(photographs)
    for found in (whole, resumed):
        found.setup("fit")
    expected = list(in_epoch(whole.train_dataloader(), 1))
    loader: Any = resumed.train_dataloader()
    loader.load_state_dict({"epoch": 1, "batches": 2})
    found_batches = list(in_epoch(loader, 1))
    assert len(found_batches) == len(expected) - 2
    for one, other in zip(found_batches, expected[2:], strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.pixels, other.pixels)


def test_balanced_sampling_and_domains_are_refused_in_one_sentence(photographs: Path) -> None:
    sentence = (
        "data.balanced_sampling shows each class equally often, which images of several classes cannot; set it to "
        "false, and model.class_weights to balanced."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        several(photographs, balanced_sampling=True).setup("fit")
    for pair in ((several(photographs), DigitsDataModule()), (DigitsDataModule(), several(photographs))):
        with pytest.raises(UserError, match=r"^DomainPairDataModule takes images of one class, but the .* has"):
            DomainPairDataModule(*pair).setup("fit")


# --- labels of other loaders

IMAGES = torch.rand(4, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_rows_of_any_type_are_read_where_the_data_declare_them(dtype: torch.dtype) -> None:
    labels: Tensor = LABELS.clamp(min=0).to(dtype)
    for read in (read_batch((IMAGES, labels), multi_label=True),
                 read_training_batch((IMAGES, labels), pairs=False, multi_label=True)[0]):  # fmt: skip
        assert read.labels.is_floating_point()
        assert torch.equal(read.labels.float(), LABELS.clamp(min=0))


@pytest.mark.parametrize("labels", [torch.tensor([2, 0, 1, -1]), torch.zeros(3, 4), torch.zeros(4, 2, 2), None, "abcd"])
def test_other_labels_are_refused_where_the_data_declare_several_classes(labels: Any) -> None:
    message = r"but the data declare multi_label; give \(4, C\), 1 for each class|without labels; change"
    with pytest.raises(UserError, match=message):
        read_batch((IMAGES, labels), multi_label=True)
    if labels is None:
        assert read_batch((IMAGES,), multi_label=True, labelled=False).labels.tolist() == [-1] * 4


def test_rows_of_zeros_and_ones_are_refused_where_nothing_declares_them() -> None:
    with pytest.raises(UserError, match=r"declare multi_label = True in the data module\.$"):
        read_batch((IMAGES, LABELS.long()))
    with pytest.raises(UserError, match=r"one sums to 2; .* declare multi_label = True in the data module\.$"):
        check_labels(LABELS, num_classes=3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[1.0, 2.0, 0.0]]), "contain 2, but of multi-label data they are 1 for each class"),
        (torch.tensor([[1.0, -1.0, 0.0]]), "contain -1, but"),
        (torch.tensor([[1.0, float("nan"), 0.0]]), "contain nan, but"),
        (torch.ones(2, 4), r"have the shape \(2, 4\), but the data declare multi_label and there are 3 classes"),
        (torch.zeros(2, dtype=torch.int64), r"have the shape \(2,\), but the data declare multi_label"),
    ],
)
def test_values_of_several_classes_are_checked(labels: Tensor, message: str) -> None:
    check_labels(LABELS, num_classes=3, multi_label=True)
    with pytest.raises(UserError, match=message):
        check_labels(labels, num_classes=3, multi_label=True)
