"""Data sets of torchvision, mappings as of Hugging Face, and a class of your own."""

import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.io
import torch
import torchvision.transforms.functional as F
import yaml
from command_options import QUICK, QUIET
from grouped_options import grouped
from jsonargparse import ArgumentParser
from made_photographs import photograph
from PIL import Image
from reading import in_epoch, in_memory
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import FakeData, Flowers102, OxfordIIITPet
from torchvision.transforms import v2

from kd_lightning import DatasetDataModule, DistillationModule
from kd_lightning.data import Batch
from kd_lightning.data.image_set import StreamedImages
from kd_lightning.networks import resnet20

SIZES = [(40, 56), (61, 33), (30, 30)]


class Own(Dataset[Any]):
    """A class as users write it, whose samples are what ``make`` returns."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self.count = count
        self.make = make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        if number >= self.count:
            raise IndexError(number)
        return self.make(number)


def picture(number: int) -> Image.Image:
    return photograph(*SIZES[number % 3], seed=number)


def pil(number: int) -> Any:
    return picture(number), number % 3


def mapping(number: int) -> Any:
    return {"img": picture(number), "fine": number % 3, "caption": "none"}


def as_bytes(number: int) -> Any:
    return torch.from_numpy(np.array(picture(number))).permute(2, 0, 1), torch.tensor(number % 3)


def as_floats(number: int) -> Any:
    return as_bytes(number)[0] / 255, np.int64(number % 3), "ignored"


def own(make: Callable[[int], Any] = pil, count: int = 30, **options: Any) -> DatasetDataModule:
    given = {"image_size": 24, "batch_size": 6, "val_fraction": 0.2, "test": Own(7, make)} | options
    return DatasetDataModule(Own(count, make), **grouped(**given))


def train_batches(data: DatasetDataModule, epoch: int = 0) -> list[Batch]:
    return [data.augment(batch) for batch in in_epoch(data.train_dataloader(), epoch)]


@pytest.mark.parametrize("make", [mapping, as_bytes, as_floats])
def test_all_kinds_of_samples_give_the_same_views(make: Callable[[int], Any]) -> None:
    keys: dict[str, Any] = {"image_key": "img", "label_key": "fine"} if make is mapping else {}
    expected, found = own(preset="strong"), own(make, preset="strong", **keys)
    for first, second in zip(train_batches(expected), train_batches(found), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert expected.num_classes == found.num_classes == 3
    ids = torch.cat([batch.ids for batch in found.val_dataloader()])
    assert len(ids) == 6
    assert not {*ids.tolist()} & {*torch.cat([batch.ids for batch in train_batches(found)]).tolist()}


@pytest.mark.parametrize(
    "way",
    [{"memory_limit": 0.0, "cache": "off"}, {"memory_limit": 0.0, "cache": "off", "num_workers": 2}, {"cache": ""}],
)
def test_memory_a_file_and_workers_give_the_same_views(way: dict[str, Any], tmp_path: Path) -> None:
    if way.get("cache") == "":
        way = {"cache": str(tmp_path)}
    for first, second in zip(train_batches(own(), 2), train_batches(own(**way), 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_a_student_learns_with_cached_logits(make_trainer: Callable[..., pl.Trainer]) -> None:
    data = own(preset="standard", views=2)
    module = DistillationModule(
        resnet20(num_classes=3), resnet20(num_classes=3), teacher_check="off", teacher_cache=True
    )
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, data)
    assert trainer.global_step == 8
    make_trainer().test(module, data)


def test_random_transforms_of_the_data_set_stay_random_and_have_no_views() -> None:
    noise = v2.ColorJitter(0.5)
    data = own(lambda number: (noise(picture(number)), number % 3), preset="none")
    first, second = train_batches(data, 0), train_batches(data, 0)
    assert isinstance(data.splits["train"], StreamedImages)
    assert not torch.equal(first[0].images, second[0].images)
    with pytest.raises(ValueError, match=r"^views need images that stay the same, but train returns another image for"):
        train_batches(own(lambda number: (noise(picture(number)), number % 3), views=2))


def test_unlabelled_samples_have_no_class() -> None:
    data = own(lambda number: (picture(number), None if number % 2 else 0), num_classes=3, preset="none")
    labels = torch.cat([batch.labels for batch in train_batches(data)])
    assert {*labels.tolist()} == {-1, 0}


class Deep(Own):
    classes = ("a", "b", "c")


def test_class_names_are_those_of_the_data_set() -> None:
    assert DatasetDataModule(Deep(6, pil), image_size=24).classes == ("a", "b", "c")
    assert DatasetDataModule(Deep(6, pil), image_size=24, num_classes=5).classes == tuple("01234")


def test_samples_that_share_a_file_are_read_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "pixels").write_bytes(bytes(number for number in range(40) for _ in range(64)))
    with (tmp_path / "pixels").open("rb") as file:

        def make(number: int) -> Any:
            file.seek(64 * number)
            time.sleep(0.0005)  # another thread would move the position
            return torch.frombuffer(bytearray(file.read(64)), dtype=torch.uint8).view(1, 8, 8), number % 2

        data = own(make, count=40, image_size=None, preset="none", mean=[0.5], std=[0.5], test=None)
        data.setup("fit")
    assert in_memory(data.splits["train"]).pixels[:, 0, 0, 0].tolist() == list(range(40))


def test_each_sample_is_read_once_for_its_label_and_size() -> None:
    read: Counter[int] = Counter()

    def make(number: int) -> Any:
        read[number] += 1
        return pil(number)

    data = own(make, count=64)
    assert data.num_classes == 3
    assert read == Counter(range(64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda number: picture(number), r"^Sample 0 of train must be \(image, label\) or a mapping, got Image;"),
        (lambda number: {"picture": 1, "label": 2}, r"has no 'image', but 'picture', 'label'; set image_key"),
        (
            lambda number: (picture(number), "cat"),
            r"^The label of sample 0 of train must be an integer, a list of them if an image may "
            r"have several classes, or None, got str;",
        ),
        (lambda number: ("a.jpg", 0), r"^The image of sample 0 of train must be a PIL image or a tensor"),
        (lambda number: (torch.randn(3, 8, 8), 0), r"has values outside \[0, 1\]; remove Normalize"),
        (lambda number: (torch.zeros(5, 8, 8, dtype=torch.uint8), 0), r"must have bytes or floats and 1 or 3 channels"),
        (
            lambda number: (torch.zeros(8, 6, 3, dtype=torch.uint8), 0),
            r"1 or 3 channels, got uint8 \(8, 6, 3\); a tensor is \(channels, H, W\), an array \(H, W, channels\)\.$",
        ),
        (lambda number: (picture(number), 7), r"^Label 7 of the 'train' images is outside \[0, 3\)"),
    ],
)
def test_samples_that_cannot_be_read_are_refused(make: Callable[[int], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own(make, num_classes=3).setup("fit")


# --- images of several classes


def several(labels: list[Any], **options: Any) -> DatasetDataModule:
    def make(number: int) -> Any:
        return picture(number), labels[number % len(labels)]

    return own(make, preset="none", **options)


def test_lists_of_class_indices_declare_several_classes() -> None:
    data = several([[0, 2], [1], [], None, (2, 1)])
    assert (data.multi_label, data.num_classes, data.classes) == (True, 3, ("0", "1", "2"))
    rows = torch.cat([batch.labels for batch in train_batches(data)])
    assert {*map(tuple, rows.tolist())} == {(1, 0, 1), (0, 1, 0), (0, 0, 0), (-1, -1, -1), (0, 1, 1)}
    data.setup("test")
    rows = torch.cat([batch.labels for batch in data.test_dataloader()])
    assert rows.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [-1, -1, -1], [0, 1, 1], [1, 0, 1], [0, 1, 0]]
    assert not own().multi_label


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[0, 1, 0, 1]],
            r"^The label of sample 0 of train must list the index of each of its classes once, got 0, 1, 0, 1",
        ),
        ([[0], [-1]], r"^The label of sample 1 of train must list the index of each of its classes once, got -1"),
        ([[0.5, 0.5]], r"^The label of sample 0 of train must be an integer, a list of them .*, got float;"),
        ([[0], [1], 1], r"^The label of sample 2 of train is one class, and that of others in train is not; give all"),
        ([[0], [1, 7]], r"^Label 7 of the 'train' images is outside \[0, 3\)"),
    ],
)
def test_lists_that_are_no_class_indices_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        several(labels, num_classes=3).setup("fit")


def test_lists_in_the_test_set_alone_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^The label of sample 0 of test is a list, and that of others in train is not"
    ):
        own(test=Own(7, lambda number: (picture(number), [0, 1]))).setup("test")


def test_a_student_is_distilled_on_lists_of_classes_from_start_to_test(make_trainer: Callable[..., pl.Trainer]) -> None:
    data = several([[0, 2], [1], [], [2, 1]], num_classes=3)
    module = DistillationModule(resnet20(num_classes=3), resnet20(num_classes=3), teacher_check="off")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, data)
    assert "test/map" in make_trainer().test(module, data)[0]


def test_data_sets_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^train must have a length and dataset\[i\], which generator does not have;"):
        DatasetDataModule(pil(i) for i in range(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^train is empty; give a data set with samples\.$"):
        own(count=0).setup("fit")
    with pytest.raises(
        ValueError, match=r"^The images of train have different sizes; set image_size to resize them\.$"
    ):
        own(image_size=None).setup("fit")


def test_it_is_built_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    node = {
        "class_path": "kd_lightning.DatasetDataModule",
        "init_args": {
            "train": {"class_path": "torchvision.datasets.FakeData", "init_args": {"size": 20, "num_classes": 4}},
            "num_classes": 4,
            "image_size": 32,
            "batch_size": 5,
            "augmentation": {"preset": "standard"},
        },
    }
    data = parser.instantiate_classes(parser.parse_object(yaml.safe_load(yaml.safe_dump({"data": node})))).data
    shown: Tensor = train_batches(data)[0].images
    assert shown.shape == (5, 3, 32, 32)


class Mappings(Own):
    """A data set as Hugging Face's: samples are mappings, and features name the classes."""

    def __init__(self, count: int = 20) -> None:
        super().__init__(count, mapping)
        self.features = {"img": object(), "fine": SimpleNamespace(names=["ant", "bee", "cat"])}


def test_a_list_of_named_classes_as_hugging_face_declares_it() -> None:
    train = Own(8, lambda number: {"image": picture(number), "label": [number % 3]})
    names = SimpleNamespace(feature=SimpleNamespace(names=["ant", "bee", "cat"]))  # Sequence(ClassLabel(names=...))
    train.features = {"label": names}  # type: ignore[attr-defined]
    data = DatasetDataModule(train, image_size=24)
    assert (data.classes, data.multi_label) == (("ant", "bee", "cat"), True)


HUGGING_FACE = """
class_path: kd_lightning.DatasetDataModule
init_args:
  train: {class_path: test_dataset.Mappings}
  test: {class_path: test_dataset.Mappings, init_args: {count: 6}}
  image_key: img
  label_key: fine
  image_size: 24
  batch_size: 5
"""


def test_mappings_with_named_classes_are_read_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": yaml.safe_load(HUGGING_FACE)})).data
    assert data.classes == ("ant", "bee", "cat")
    assert {tuple(batch.images.shape) for batch in train_batches(data)} == {(5, 3, 24, 24)}
    data.setup("test")
    assert torch.cat([batch.labels for batch in data.test_dataloader()]).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_network_is_trained_and_tested_on_mappings_from_the_command_line(
    kd: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "data.yaml").write_text(f"data:\n{textwrap.indent(HUGGING_FACE, '  ')}")
    model = ["--model=kd_lightning.TeacherModule", "--model.network=kd_lightning.networks.resnet20"]
    kd("fit", *model, "--model.network.num_classes=3", "-c=data.yaml", *QUICK, "--trainer.log_every_n_steps=1")
    assert "test/accuracy" in kd("test", "-c=lightning_logs/version_0", *QUIET)


def test_torchvisions_data_sets_need_no_transform() -> None:
    data = DatasetDataModule(FakeData(24, (3, 30, 50), 4), num_classes=4, image_size=24, batch_size=8)
    assert [len(batch.ids) for batch in train_batches(data)] == [8, 8]


def test_flowers_as_torchvision_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 13):
        picture(number).save(folder / "jpg" / f"image_{number:05}.jpg")
    ids = np.arange(1, 13, dtype=np.uint16)[None]
    scipy.io.savemat(folder / "setid.mat", {"trnid": ids[:, :6], "valid": ids[:, 6:9], "tstid": ids[:, 9:]})
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)  # the published files have other digests
    train, val, test = (Flowers102(str(tmp_path), split) for split in ("train", "val", "test"))
    data = DatasetDataModule(train, val, test, num_classes=102, image_size=24, batch_size=3)
    shown = torch.cat([batch.labels for batch in train_batches(data)])
    assert sorted(shown.tolist()) == list(range(6))
    assert torch.cat([batch.labels for batch in data.val_dataloader()]).tolist() == [6, 7, 8]
    assert torch.cat([batch.labels for batch in data.test_dataloader()]).tolist() == [9, 10, 11]
    with Image.open(folder / "jpg" / "image_00010.jpg") as image:
        expected = F.center_crop(F.resize(image, [24]), [24])
    assert torch.equal(data.pixels(next(iter(data.test_dataloader())))[0], F.pil_to_tensor(expected))


def test_pets_as_torchvision_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    names = [f"{breed}_{number}" for breed in ("Abyssinian", "beagle") for number in range(5)]
    for number, name in enumerate(names):
        picture(number).save(folder / "images" / f"{name}.jpg")
    lines = [f"{name} {1 + number // 5} 1 1" for number, name in enumerate(names)]
    (folder / "annotations" / "trainval.txt").write_text("\n".join(lines) + "\n")
    data = DatasetDataModule(OxfordIIITPet(str(tmp_path)), image_size=24, batch_size=4, val_fraction=0.2)
    assert data.classes == ("Abyssinian", "Beagle")
    assert torch.cat([batch.labels for batch in train_batches(data)]).bincount().tolist() == [4, 4]
    assert data.cache_folder.is_relative_to(tmp_path)
