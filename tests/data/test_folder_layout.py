"""The layouts of folders in which people have their images."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_image_folder import batches, write_image

from kd_lightning import (
    Checkpoint,
    DistillationModule,
    DomainPairDataModule,
    ImageFolderDataModule,
    Run,
    TeacherModule,
)
from kd_lightning.data import Augmentation, DigitsDataModule
from kd_lightning.data.image_set import ImageSet
from kd_lightning.errors import UserError
from kd_lightning.losses import HardTargetLoss, MMDLoss
from kd_lightning.modules.adaptation import AdaptationModule
from kd_lightning.networks import DataConfig, ResNet, data_config
from kd_lightning.networks.data_config import set_data_config


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    return caplog


def write(root: Path, *places: str) -> Path:
    for place in places:
        write_image(root / place)
    return root


def write_classes(root: Path, count: int = 20) -> Path:
    return write(root, *(f"{name}/{i:02}.png" for name in ("cat", "dog") for i in range(count)))


def listed(data: ImageFolderDataModule, split: str) -> dict[str, int]:
    """Return the label of each file of a split, by its place in the root."""
    images = data.splits.read(split)
    return {
        Path(images.name(i)).relative_to(data.root).as_posix(): label for i, label in enumerate(images.labels.tolist())
    }


def network() -> ResNet:
    return ResNet([1], [4], num_classes=2)


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return pl.Trainer(default_root_dir=folder, log_every_n_steps=1, **quiet, **{"max_epochs": 1, **options})


# --- labelled images


def test_images_in_sub_folders_of_a_class_belong_to_it(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/dog/poodle/c.png", "train/dog/poodle/toy/d.png")
    assert listed(ImageFolderDataModule(str(tmp_path)), "train") == {
        "train/cat/a.png": 0,
        "train/dog/b.png": 1,
        "train/dog/poodle/c.png": 1,
        "train/dog/poodle/toy/d.png": 1,
    }


def test_files_of_all_classes_that_are_left_out_are_counted_once(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/dog/c.gif")
    for place in ("cat/b.heic", "dog/d.HEIC", "dog/notes.txt", "dog/._c.png", "dog/.DS_Store", "__MACOSX/x.png"):
        (tmp_path / "train" / place).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / place).touch()
    data = ImageFolderDataModule(str(tmp_path))
    with pytest.warns(
        UserWarning, match=r"3 files of .*train' are left out, .*: 2 \.heic, 1 \.txt; install pillow-heif"
    ):
        assert len(data.splits.read("train").labels) == 3


def test_images_beside_the_class_folders_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/loose.png")
    with pytest.warns(
        UserWarning, match=r"Images directly in .*train' are left out, .*: loose\.png; unlabelled images"
    ):
        assert len(ImageFolderDataModule(str(tmp_path)).splits.read("train").labels) == 2


@pytest.mark.parametrize("name", ["valid", "Validation", "TEST"])
def test_a_folder_that_may_be_a_split_is_reported(tmp_path: Path, name: str) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", f"{name}/cat/a.png")
    with pytest.warns(UserWarning, match=rf"{name}' is not read; if it is '(val|test)', rename it\."):
        ImageFolderDataModule(str(tmp_path)).splits.read("train")


# --- a root whose folders are the classes


def test_a_root_of_class_folders_is_divided(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    data = ImageFolderDataModule(str(write_classes(tmp_path)), split_seed=4)
    data.setup("fit")
    data.setup("test")
    assert data.classes == ("cat", "dog")
    parts = {split: listed(data, split) for split in ("train", "val", "test")}
    assert [list(part.values()) for part in parts.values()] == [[0] * 16 + [1] * 16, [0, 0, 1, 1], [0, 0, 1, 1]]
    assert len({file for part in parts.values() for file in part}) == 40
    (line,) = [message for message in info.messages if not message.startswith("Data: ")]
    assert line == (
        f"{str(tmp_path)!r} has no train/, so its 2 folders are the classes (cat, dog): 32 images are trained on, 4 "
        "validated on and 4 tested on, by split_seed 4."
    )
    assert listed(data, "predict") == parts["test"]
    again = ImageFolderDataModule(str(tmp_path), seed=7, split_seed=4)
    assert listed(again, "test") == parts["test"]
    other = ImageFolderDataModule(str(tmp_path), split_seed=5)
    assert listed(other, "test") != parts["test"]


def test_val_fraction_is_of_all_images(tmp_path: Path) -> None:
    data = ImageFolderDataModule(str(write_classes(tmp_path)), val_fraction=0.25)
    assert [len(listed(data, split)) for split in ("train", "val", "test")] == [26, 10, 4]


def test_the_checkpoint_keeps_which_images_are_tested_on(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images")
    data = ImageFolderDataModule(str(root), batch_size=8)
    fit = trainer(tmp_path)
    fit.fit(TeacherModule(network()), data)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    held_out = listed(data, "test")
    gone = next(iter(held_out))
    (root / gone).unlink()
    write(root, *(f"cat/new{i}.png" for i in range(9)))

    changed = ImageFolderDataModule(str(root), batch_size=8)
    assert (
        listed(changed, "test").keys() - held_out.keys()
    )  # drawn again, images would be tested on that were trained on
    changed = ImageFolderDataModule(str(root), batch_size=8)
    told = (
        "has changed since the checkpoint was saved: it had 40 labelled images and has 48; 0 of the validation and 1 of"
    )
    with pytest.warns(UserWarning, match=re.escape(told)):
        trainer(tmp_path).test(TeacherModule(network()), changed, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert listed(changed, "test") == {name: label for name, label in held_out.items() if name != gone}

    rebuilt = ImageFolderDataModule(str(root), batch_size=8)  # as by `report` and `export`
    Checkpoint(tmp_path / "a.ckpt").restore_data(rebuilt)
    with pytest.warns(UserWarning, match=re.escape(told)):
        assert listed(rebuilt, "test") == listed(changed, "test")

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a.ckpt").rename(tmp_path / "run" / "checkpoints" / "best.ckpt")
    described = {"class_path": "kd_lightning.ImageFolderDataModule", "init_args": {"root": str(root)}}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": {}, "data": described}))
    with pytest.warns(UserWarning, match=re.escape(told)):
        images = Run(tmp_path / "run").images("test")
    assert images is not None
    assert images[1].tolist() == list(listed(changed, "test").values())


def test_other_layouts_keep_nothing_in_checkpoints(tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    data = ImageFolderDataModule(str(tmp_path))
    data.setup("fit")
    assert data.state_dict() == {}


def test_a_root_whose_folders_may_be_splits_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "Training")
    write_classes(tmp_path / "Testing")
    with pytest.raises(UserError, match=r"has no folder train/, but 'Testing'; rename that to 'test', or, if it is a"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_a_root_with_one_folder_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "images")
    with pytest.raises(
        UserError, match=r"only the folder 'images', which is not two classes; if it holds the images, set"
    ):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_the_folder_of_runs_is_not_a_class(tmp_path: Path) -> None:
    (write_classes(tmp_path) / "lightning_logs" / "version_0").mkdir(parents=True)
    assert len(listed(ImageFolderDataModule(str(tmp_path)), "test")) == 4


def test_another_set_than_that_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    data = ImageFolderDataModule(str(write_classes(tmp_path / "images")))
    data.setup("fit")
    other = write(tmp_path / "other", *(f"{name}/x{i}.png" for name in ("cat", "dog") for i in range(20)))
    restored = ImageFolderDataModule(str(other))
    restored.load_state_dict(data.state_dict())
    with (
        pytest.warns(UserWarning, match="has changed since the checkpoint was saved"),
        pytest.raises(UserError, match=r"other' holds none of the test images that the checkpoint names; put those of"),
    ):
        restored.setup("test")


def test_too_few_images_to_divide_are_refused(tmp_path: Path) -> None:
    data = ImageFolderDataModule(str(write_classes(tmp_path, count=2)))
    with pytest.raises(
        UserError, match=r"too few images in each class to divide them; put them into train/<class>/ and"
    ):
        data.setup("test")


# --- unlabelled images


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled"])
@pytest.mark.parametrize("place", ["train", "."])
def test_unlabelled_images_beside_the_classes_are_trained_on_and_not_validated_on(
    tmp_path: Path, place: str, name: str
) -> None:
    write(write_classes(tmp_path / place).parent if place != "." else write_classes(tmp_path), f"{name}/deep/x.png")
    data = ImageFolderDataModule(str(tmp_path), batch_size=4)
    assert data.classes == ("cat", "dog")
    assert listed(data, "train")[f"{name}/deep/x.png"] == -1
    assert data.splits["train"].labels[data.train_samples].eq(-1).sum() == 1
    assert torch.cat([batch.labels for batch in batches(data, "val")]).min() == 0


@pytest.mark.parametrize("place", ["train", ".", "unlabelled"])
def test_a_flat_folder_is_unlabelled(tmp_path: Path, place: str) -> None:
    write(tmp_path, *(f"{place}/{i:02}.png" for i in range(10)))
    data = ImageFolderDataModule(str(tmp_path), batch_size=3)
    assert data.classes == ()
    assert set(listed(data, "train").values()) == {-1}
    assert sum(len(batch.labels) for batch in batches(data, "train")) == 9
    assert sum(len(batch.labels) for batch in batches(data, "val")) == 1


def test_a_root_without_folders_is_predicted(tmp_path: Path) -> None:
    write(tmp_path, *(f"{i}.png" for i in range(3)))
    assert listed(ImageFolderDataModule(str(tmp_path)), "predict") == {"0.png": -1, "1.png": -1, "2.png": -1}


def test_a_flat_train_beside_other_folders_of_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "bus/a.png", "car/a.png", "train/a.png")  # train is a class here
    with pytest.raises(
        UserError, match=r"train' holds images and no class folders, beside bus, car; if all of these are"
    ):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_a_student_learns_from_unlabelled_photographs(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    write(tmp_path, *(f"train/{i:02}.png" for i in range(20)))
    data = ImageFolderDataModule(str(tmp_path), batch_size=6)
    teacher = network()
    set_data_config(teacher, DataConfig.of(classes=["cat", "dog"]))
    student = DistillationModule(network(), teacher, temperature=2.0, alpha=0.9)
    before = {name: weight.clone() for name, weight in student.network.named_parameters()}
    best = ModelCheckpoint(tmp_path / "run", "best", monitor="val/accuracy", mode="max")
    trainer(tmp_path, callbacks=[best]).fit(student, data)
    assert all(not torch.equal(weight, before[name]) for name, weight in student.network.named_parameters())
    assert "No training image is labelled, so the student learns from its teacher only." in info.messages
    assert best.monitor == "val/agreement"
    assert Path(best.best_model_path).name == "best.ckpt"
    assert data_config(student.network).classes == ("cat", "dog")


def test_a_module_that_learns_from_labels_refuses_unlabelled_images(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/{i:02}.png" for i in range(20)))
    with pytest.raises(UserError, match=r"^No training image is labelled, and TeacherModule learns from labels; put"):
        trainer(tmp_path).fit(TeacherModule(network()), ImageFolderDataModule(str(tmp_path)))


class _UnlabelledValidation(DigitsDataModule):
    def load(self, split: str) -> ImageSet | None:
        images = super().load("test" if split == "val" else split)
        assert images is not None
        return replace(images, labels=torch.full_like(images.labels, -1)) if split == "val" else images


def test_an_accuracy_that_cannot_be_measured_is_not_followed(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "run", monitor="val/accuracy", mode="max")
    module = TeacherModule(ResNet([1], [4], in_channels=1))
    with pytest.raises(
        UserError, match=r"^No validation image is labelled, so there is no val/accuracy to follow; label"
    ):
        trainer(tmp_path, callbacks=[best]).fit(module, _UnlabelledValidation())


def test_a_flat_folder_is_a_target_domain(tmp_path: Path) -> None:
    write_classes(tmp_path / "source" / "train")
    write(tmp_path / "target", *(f"{i:02}.png" for i in range(20)))
    source, target = (
        ImageFolderDataModule(str(tmp_path / name), batch_size=8, augmentation=Augmentation(padding=0))
        for name in ("source", "target")
    )
    module = AdaptationModule(network(), {"hard": HardTargetLoss(), "mmd": MMDLoss(layers=["avgpool"])})
    fit = trainer(tmp_path)
    fit.fit(module, DomainPairDataModule(source, target))
    assert fit.callback_metrics["train/mmd"] > 0
    assert set(listed(target, "train").values()) == {-1}
