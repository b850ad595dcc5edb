"""Photographs of various sizes: their forms, their views at two sizes, and the networks that they follow."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from grouped_options import grouped
from PIL import Image
from reading import in_epoch
from torch import Tensor, nn

from kd_lightning import DistillationModule, DomainPairDataModule, ImageFolderDataModule, TeacherModule
from kd_lightning.data import Batch
from kd_lightning.data.augmentation.crops import normalize
from kd_lightning.data.image_set import StreamedImages
from kd_lightning.data.sizes import Wanted, choose_sizes
from kd_lightning.files.prepare import Preparation, prepare
from kd_lightning.networks import resnet20
from kd_lightning.networks.data_config import DataConfig, data_config, set_data_config

SIZES = [(40, 56), (61, 33), (30, 30), (90, 44)]


def picture(height: int, width: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 12), ("test", 3)):
        for number, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture(*SIZES[i % 4], seed=100 * number + i).save(folder / split / name / f"{i:02}.png")
    return folder


def photographs(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        str(root), **grouped(**{"image_size": 24, "batch_size": 5, "val_fraction": 0.25} | options)
    )


def train_batches(data: ImageFolderDataModule, epoch: int = 0) -> list[Batch]:
    return [data.augment(batch) for batch in in_epoch(data.train_dataloader(), epoch)]


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --- the size where nothing knows one


def test_the_default_size_is_that_of_images_whose_networks_know_none(root: Path) -> None:
    data = photographs(root, image_size=None, default_size=24)
    assert data.image_shape == (3, 24, 24)
    data.follow_networks({"the network": DataConfig.of(preparation=Preparation.of(32))})
    assert data.image_shape == (3, 32, 32)
    data.follow_networks({"the network": DataConfig(), "the teacher": DataConfig.of(preparation=Preparation.of(40))})
    assert data.image_shape == (3, 40, 40)
    given = photographs(root, image_size=28, default_size=24)
    given.follow_networks({"the network": DataConfig.of(preparation=Preparation.of(32))})
    assert given.image_shape == (3, 28, 28)
    assert photographs(root, image_size=None, default_size=24, eval_size=30).preparation == Preparation.of(30)
    assert ImageFolderDataModule(str(root), default_size=24).hparams["default_size"] == 24
    with pytest.raises(ValueError, match=r"^default_size must be a number of pixels >= 1, got 0\.$"):
        photographs(root, image_size=None, default_size=0)


# --- evaluation


@pytest.mark.parametrize("preset", ["none", "standard"])
@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
@pytest.mark.parametrize(
    ("options", "resize", "size"),
    [({}, 24, 24), ({"eval_crop": 0.75}, 32, 24), ({"eval_size": 30, "interpolation": "bicubic"}, 30, 30)],
)
def test_evaluation_shows_the_pixels_of_torchvisions_transform(
    root: Path, preset: str, memory_limit: float, options: dict[str, Any], resize: int, size: int
) -> None:
    data = photographs(root, preset=preset, memory_limit=memory_limit, **options)
    data.setup("fit")
    data.setup("test")
    mode = F.InterpolationMode(options.get("interpolation", "bilinear"))
    for split, loader in (("test", data.test_dataloader()), ("val", data.val_dataloader())):
        seen = 0
        for batch in loader:
            for shown, sample in zip(data.pixels(batch), batch.ids.tolist(), strict=True):
                with Image.open(data.image_name(split, sample)) as image:
                    expected = F.center_crop(F.resize(image, [resize], mode), [size])
                assert torch.equal(shown, pixels_of(expected))
                seen += 1
        assert seen == 6


# --- training


@pytest.mark.parametrize("preset", ["standard", "strong"])
def test_memory_a_file_and_workers_give_the_same_views(root: Path, preset: str, tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"cache": str(tmp_path / "decoded")},
        {"memory_limit": 0.0, "cache": "off"},
        {"memory_limit": 0.0, "cache": "off", "num_workers": 2},
        {"batch_size": 9},
    ]
    seen = []
    for way in ways:
        data = photographs(root, preset=preset, teacher_size=40, **way)
        shown: dict[int, tuple[Tensor, ...]] = {}
        for batch in train_batches(data, epoch=3):
            assert batch.teacher_images is not None
            rows = zip(batch.ids.tolist(), batch.images, batch.teacher_images, strict=True)
            shown |= {sample: views for sample, *views in rows}  # type: ignore[misc]
        seen.append(shown)
    assert len(list((tmp_path / "decoded").glob("*.images"))) == 3  # of training, and of validation at two sizes
    for other in seen[1:]:
        both = seen[0].keys() & other.keys()
        assert len(both) > 10
        assert all(torch.equal(a, b) for sample in both for a, b in zip(seen[0][sample], other[sample], strict=True))


def test_training_images_are_cut_from_smaller_stored_ones(root: Path) -> None:
    data = photographs(root, crop_scale=(0.3, 1.0))
    data.setup("fit")
    images = data.splits["train"]
    assert isinstance(images, StreamedImages)
    assert data.sizes is not None
    assert data.sizes.store_size == 28  # 1.15 times 24
    shapes = {tuple(images.images.read(sample).shape[1:]) for sample in range(4)}
    assert shapes == {(28, 39), (52, 28), (28, 28), (57, 28)}
    larger = photographs(root, crop_scale=(0.3, 1.0), store_size=400)
    larger.setup("fit")
    assert larger.splits["train"].images.read(3).shape[1:] == SIZES[3]  # type: ignore[union-attr]
    assert larger.fingerprint()["images"] != data.fingerprint()["images"]


@pytest.mark.parametrize("flips", [{}, {"flip": True, "vertical_flip": True}])
def test_the_teacher_sees_the_same_image_also_without_random_crops(root: Path, flips: dict[str, bool]) -> None:
    data = photographs(root, preset="none", teacher_size=48, **flips)
    for batch in train_batches(data, epoch=1):
        assert batch.teacher_images is not None
        assert batch.teacher_images.shape[2:] == (48, 48)
        smaller = nn.functional.interpolate(batch.teacher_images, (24, 24), mode="bilinear", antialias=True)
        assert (smaller - batch.images).abs().mean() < 0.3


def test_padding_and_another_size_for_the_teacher_exclude_each_other(root: Path) -> None:
    message = (
        "augmentation.padding counts pixels of one size, but the teacher's images have 48x48 and the others 24x24; set "
        "augmentation.resized_crop to true, or teacher_size and image_size alike."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        photographs(root, preset="light", teacher_size=48)


def test_images_to_predict_are_not_prepared_for_a_teacher(root: Path) -> None:
    data = photographs(root, teacher_size=48)
    data.setup("predict")
    assert all(batch.teacher_pixels is None for batch in data.predict_dataloader())


def test_mixed_views_at_two_sizes_are_cached(root: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    losses = []
    torch.manual_seed(0)
    student, teacher = resnet20(num_classes=2), resnet20(num_classes=2)
    for where in (False, True):
        data = photographs(root, preset="strong", teacher_size=40, views=2)
        module = DistillationModule(
            student, teacher, learning_rate=1e-9, weight_decay=0.0, teacher_check="off", teacher_cache=where
        )
        trainer = make_trainer(max_epochs=3)
        trainer.fit(module, data)
        losses.append(float(trainer.callback_metrics["train/soft"]))
        assert (module.frozen_teacher.cache is not None) == where  # type: ignore[union-attr]
    assert losses[0] > 0
    assert abs(losses[0] - losses[1]) < 2e-3 * losses[0]  # the cache holds float16


def with_teacher(root: Path, student: Preparation, teacher: Preparation, **options: Any) -> ImageFolderDataModule:
    """Data that follow a student and a teacher of these preparations."""
    data = photographs(root, image_size=None, **options)
    known = {"the network": student, "the teacher": teacher}
    data.follow_networks({name: DataConfig.of(preparation=one) for name, one in known.items()})
    return data


def prepared(data: ImageFolderDataModule, batch: Any, split: str, preparation: Preparation) -> Tensor:
    """The normalized images of a batch in a preparation."""
    images = []
    for sample in batch.ids.tolist():
        with Image.open(data.image_name(split, sample)) as image:
            images.append(pixels_of(prepare(image, preparation)))
    return normalize(torch.stack(images), mean=data.mean, std=data.std)


@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
@pytest.mark.parametrize("preset", ["none", "light", "standard"])
@pytest.mark.parametrize(
    "teacher",
    [
        Preparation.of(24, 24),
        Preparation.of(24, 32, interpolation="bicubic"),
        Preparation.of(24, 26, mode="squash", interpolation="bicubic"),
    ],
    ids=["crop", "interpolation", "mode"],
)
def test_a_teacher_of_the_same_size_is_evaluated_in_its_own_preparation(
    root: Path, preset: str, teacher: Preparation, memory_limit: float
) -> None:
    student = Preparation.of(24, 32)
    data = with_teacher(root, student, teacher, preset=preset, memory_limit=memory_limit)
    data.setup("fit")
    data.setup("test")
    assert data.teacher_shape is None
    for split, loader in (("test", data.test_dataloader()), ("val", data.val_dataloader())):
        for raw in loader:
            batch = data.augment(raw)
            assert batch.teacher_images is not None
            assert torch.equal(batch.images, prepared(data, batch, split, student))
            assert torch.equal(batch.teacher_images, prepared(data, batch, split, teacher))


@pytest.mark.parametrize("teacher_size", [24, 36])
def test_the_teacher_trains_on_the_students_box_with_its_own_interpolation(root: Path, teacher_size: int) -> None:
    student, teacher = Preparation.of(24, 32), Preparation.of(teacher_size, 40, interpolation="bicubic")
    data = with_teacher(root, student, teacher, preset="none")
    for batch in train_batches(data):
        assert batch.teacher_images is not None
        assert torch.equal(batch.images, prepared(data, batch, "train", student))
        same_box = student.at(teacher_size)._replace(interpolation="bicubic")
        assert torch.equal(batch.teacher_images, prepared(data, batch, "train", same_box))


def test_random_boxes_are_resized_with_the_teachers_interpolation_where_it_differs(root: Path) -> None:
    student = Preparation.of(24, 32)
    for interpolation, own_views in (("bilinear", False), ("bicubic", True)):
        data = with_teacher(root, student, Preparation.of(24, 24, interpolation=interpolation))
        assert data.sizes is not None
        crop = data._crop(data.sizes.training, data.sizes.teacher_training)
        image = pixels_of(picture(60, 80, seed=0))
        views, teacher_views = crop([image], torch.tensor([3]), 0)
        assert (teacher_views is not None) == own_views
        if teacher_views is not None:
            alone = replace(crop, interpolation="bicubic", teacher_size=None)([image], torch.tensor([3]), 0)[0]
            assert torch.equal(teacher_views, alone)
            assert not torch.equal(teacher_views, views)


def test_padded_crops_of_one_size_are_the_same_for_the_teacher(root: Path) -> None:
    student, teacher = Preparation.of(24, 32), Preparation.of(24, 32, interpolation="bicubic")
    data = with_teacher(root, student, teacher, preset="light")
    assert all(batch.teacher_images is None for batch in train_batches(data))
    with pytest.raises(ValueError, match=r"^augmentation\.padding counts pixels of one size"):
        with_teacher(root, student, teacher.at(30), preset="light")


def test_a_pair_of_domains_has_one_size_for_all_networks(root: Path) -> None:
    pair = DomainPairDataModule(photographs(root), photographs(root))
    pair.target.follow_networks({"the network": STUDENT, "the teacher": TEACHER})  # type: ignore[attr-defined]
    pair.setup("test")
    assert all(pair.augment(batch).teacher_images is None for batch in pair.test_dataloader())


def test_a_students_training_size_does_not_depend_on_its_evaluation(root: Path) -> None:
    data = photographs(root, preset="none", eval_size=30)
    data.setup("fit")
    for batch in train_batches(data):
        assert torch.equal(batch.images, prepared(data, batch, "train", Preparation.of(24)))
    for raw in data.val_dataloader():
        assert raw.pixels.shape[2:] == (30, 30)


def test_a_network_trained_at_one_size_and_evaluated_at_another_keeps_both(
    root: Path, make_trainer: Callable[..., pl.Trainer]
) -> None:
    teacher = resnet20(num_classes=2)
    set_data_config(teacher, TEACHER._replace(train_size=(32, 32)))
    data = ImageFolderDataModule(str(root), batch_size=5, val_fraction=0.25)
    module = DistillationModule(resnet20(num_classes=2), teacher, teacher_check="off")
    make_trainer(max_epochs=1).fit(module, data)
    assert data.sizes is not None
    assert (data.image_shape, data.sizes.evaluation, data.teacher_shape) == ((3, 32, 32), TEACHER.preparation, None)
    kept = data_config(module.student)
    assert (kept.train_size, kept.preparation) == ((32, 32), TEACHER.preparation)
    larger = photographs(root, preset="none")
    larger.follow_networks({"the network": DataConfig(), "the teacher": kept})
    batch = train_batches(larger)[0]
    assert batch.teacher_images is not None
    assert (batch.images.shape[2], batch.teacher_images.shape[2]) == (24, 32)
    larger.setup("test")
    shown = larger.augment(next(iter(larger.test_dataloader())))
    assert shown.teacher_images is not None
    assert (shown.images.shape[2], shown.teacher_images.shape[2]) == (24, 40)


# --- whose size and statistics


TEACHER = DataConfig.of([0.5] * 3, [0.25] * 3, preparation=Preparation.of(40, 48, interpolation="bicubic"))
STUDENT = DataConfig.of([0.4] * 3, [0.2] * 3, preparation=Preparation.of(24, 32))


def test_the_trained_network_goes_before_the_teacher_and_flags_before_both() -> None:
    unknown = DataConfig()
    sizes, origin = choose_sizes(Wanted(), {"the network": unknown, "the teacher": TEACHER})
    assert sizes is not None
    assert (origin, sizes.training, sizes.teacher_training) == ("the teacher", TEACHER.preparation, None)
    sizes, origin = choose_sizes(Wanted(), {"the network": STUDENT, "the teacher": TEACHER})
    assert sizes is not None
    assert (origin, sizes.training) == ("the network", STUDENT.preparation)
    assert sizes.teacher_evaluation == TEACHER.preparation
    sizes, origin = choose_sizes(Wanted(image_size=32), {"the network": unknown, "the teacher": TEACHER})
    assert sizes is not None
    assert (origin, sizes.training.size, sizes.training.resize) == ("given", (32, 32), (38, 38))
    assert sizes.teacher_training == sizes.teacher_evaluation == TEACHER.preparation
    sizes, _ = choose_sizes(Wanted(image_size=32, teacher_size=32), {"the teacher": TEACHER})
    assert sizes is not None
    assert sizes.teacher_training is sizes.teacher_evaluation is None
    assert choose_sizes(Wanted(), {"the network": unknown}) == (None, "")


@pytest.mark.parametrize(
    ("wanted", "sizes"),
    [
        (Wanted(), (30, 40)),
        (Wanted(image_size=32), (32, 32)),
        (Wanted(eval_size=48), (30, 48)),
        (Wanted(image_size=32, eval_size=48), (32, 48)),
    ],
)
def test_sizes_of_weights_with_one_for_training_and_one_for_evaluation(wanted: Wanted, sizes: tuple[int, int]) -> None:
    found, _ = choose_sizes(wanted, {"the network": TEACHER._replace(train_size=(30, 30))})
    assert found is not None
    assert (found.training.size[0], found.evaluation.size[0]) == sizes


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (None, "24x24 (of the network)"),
        (Preparation.of(40), "24x24 (of the network), 40x40 for the teacher"),
        (
            Preparation.of(24, 32, interpolation="bicubic"),
            "24x24 (of the network), resized by bicubic interpolation for the teacher",
        ),
        (
            Preparation.of(24, mode="squash"),
            "24x24 (of the network), resized and cropped for the teacher in evaluation as its weights expect",
        ),
    ],
)
def test_the_line_on_data_names_what_the_teacher_sees_otherwise(teacher: Preparation | None, words: str) -> None:
    sizes, origin = choose_sizes(Wanted(), {"the network": STUDENT, "the teacher": DataConfig(preparation=teacher)})
    assert sizes is not None
    assert sizes.describe(f"of {origin}") == words


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(image_size=0), r"^image_size must be a number of pixels >= 1, got 0\.$"),
        (Wanted(image_size="32"), r"^image_size must be a number of pixels >= 1, got '32'\.$"),  # type: ignore[arg-type]
        (Wanted(32, eval_size=(32, 48)), r"^eval_size must be .*, got \(32, 48\)\.$"),  # type: ignore[arg-type]
        (Wanted(image_size=32, eval_crop=1.5), r"eval_crop must be in \(0, 1\], got 1.5"),
        (Wanted(image_size=32, interpolation="nearst"), "interpolation must be bilinear or bicubic, got 'nearst'"),
        (Wanted(image_size=32, store_size=20), "store_size must be at least 32, the largest size, got 20"),
        (Wanted(teacher_size=32), "teacher_size needs the size of the images; set image_size"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wanted: Wanted, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_sizes(wanted, {})


def test_a_student_learns_at_the_teachers_size_and_keeps_it(
    root: Path, make_trainer: Callable[..., pl.Trainer]
) -> None:
    teacher = resnet20(num_classes=2)
    set_data_config(teacher, TEACHER)
    data = ImageFolderDataModule(str(root), batch_size=5, val_fraction=0.25)
    module = DistillationModule(resnet20(num_classes=2), teacher, teacher_check="off")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, data)
    assert (data.image_shape, data.mean) == ((3, 40, 40), (0.5, 0.5, 0.5))
    kept = data_config(module.student)
    assert (kept.mean, kept.preparation) == (TEACHER.mean, TEACHER.preparation)
    trainer.save_checkpoint(root / "student.ckpt")
    alone = DistillationModule(resnet20(num_classes=2))
    fresh = ImageFolderDataModule(str(root), batch_size=5)
    make_trainer().test(alone, fresh, ckpt_path=root / "student.ckpt", weights_only=True)
    assert (fresh.image_shape, fresh.mean) == (data.image_shape, data.mean)
    (batch,) = [batch for batch in fresh.test_dataloader() if 0 in batch.ids.tolist()]
    with Image.open(fresh.image_name("test", 0)) as image:
        assert kept.preparation is not None
        expected = pixels_of(prepare(image, kept.preparation))
    assert torch.equal(fresh.pixels(batch)[batch.ids.tolist().index(0)], expected)


def test_a_teacher_of_unknown_statistics_is_a_warning_that_names_the_flags(
    root: Path, make_trainer: Callable[..., pl.Trainer]
) -> None:
    module = DistillationModule(resnet20(num_classes=2), resnet20(num_classes=2), teacher_check="off")
    with pytest.warns(UserWarning, match=r"teacher was trained on are not known; .* set data\.mean and data\.std"):
        make_trainer(max_epochs=1).fit(module, photographs(root))


def test_hyper_parameters_rebuild_the_module(root: Path) -> None:
    data = photographs(root, preset="standard", teacher_size=40, eval_crop=0.9)
    again = ImageFolderDataModule(**data.hparams)
    assert dict(again.hparams) == dict(data.hparams)
    assert (again.sizes, again.augmentation) == (data.sizes, data.augmentation)


def test_a_finetuned_network_follows_its_own_weights(root: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    network = resnet20(num_classes=2)
    set_data_config(network, STUDENT)
    data = ImageFolderDataModule(str(root), batch_size=5, val_fraction=0.25)
    make_trainer(max_epochs=1).fit(TeacherModule(network), data)
    assert (data.image_shape, data.std) == ((3, 24, 24), (0.2, 0.2, 0.2))


# --- waiting for images


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"preset": "none"}, r""),
        (
            {"preset": "none", "memory_limit": 0.0, "cache": "off"},
            r"keep the decoded images \(see data\.memory_limit and data\.cache\), raise data\.num_w.*",
        ),
        ({"preset": "standard"}, r"raise data\.num_workers \(0 now, \d+ cores?\)"),
        ({"preset": "standard", "num_workers": 10_000}, r""),
        (
            {"preset": "standard", "memory_limit": 0.0, "cache": "off", "num_workers": 10_000},
            r"keep the decoded images \(see data\.memory_limit and data\.cache\)",
        ),
    ],
)
def test_faster_reading_depends_on_what_is_kept(root: Path, options: dict[str, Any], expected: str) -> None:
    data = photographs(root, **options)
    data.setup("fit")
    assert re.fullmatch(expected, ", ".join(data.faster_reading()))


@pytest.mark.parametrize("options", [{}, {"memory_limit": 0.0, "cache": "off"}])
def test_work_that_may_be_long_shows_its_progress(
    root: Path,
    options: dict[str, Any],
    make_trainer: Callable[..., pl.Trainer],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kd_lightning.files.progress.DELAY", -1.0)  # all work is long enough
    data = photographs(root, views=2, image_size=300, **options)  # so that a view has several batches
    networks = [nn.Sequential(nn.Conv2d(3, 2, 50, 50), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in range(2)]
    module = DistillationModule(*networks, teacher_check="off", teacher_cache=True)
    make_trainer(max_epochs=2).fit(module, data)
    titles = re.findall(r"^(.*): \d+ % of \d+ images, ", capfd.readouterr().err, re.MULTILINE)
    decoding = [] if options else ["Decoding images"]
    views = [f"Computing outputs for view {view} of 2" for view in (1, 2)]
    assert list(dict.fromkeys(titles)) == ["Reading sizes", *decoding, *views]


# --- what is accepted is used, and read once


@pytest.mark.parametrize("options", [{"preset": "none"}, {"crop_scale": (0.5, 1.0), "store_size": 80}])
def test_views_for_a_teacher_of_another_size_have_another_fingerprint(root: Path, options: dict[str, Any]) -> None:
    digests = [photographs(root, views=2, teacher_size=size, **options).fingerprint() for size in (None, 40, 48, 40)]
    assert digests[1] == digests[3]
    assert len({digest["images"] for digest in digests}) == 3
    streamed = photographs(root, views=2, teacher_size=40, memory_limit=0.0, cache="off", **options)
    assert streamed.fingerprint() == digests[1]


def test_a_store_size_without_random_crops_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"^store_size is the size of images that random crops are cut from; set"):
        photographs(root, preset="light", store_size=40)


def test_a_teacher_size_without_a_teacher_is_a_warning(root: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    data = photographs(root, teacher_size=40)
    with pytest.warns(UserWarning, match=r"^teacher_size is not used, since TeacherModule has no teacher here\.$"):
        make_trainer(max_epochs=1).fit(TeacherModule(resnet20(num_classes=2)), data)
    assert data.teacher_shape is None
    assert all(batch.teacher_images is None for batch in train_batches(data))


def test_other_statistics_do_not_decode_the_images_again(root: Path) -> None:
    data = photographs(root, preset="none")
    data.setup("fit")
    images = data.splits["train"]
    data.follow_networks({"the network": DataConfig.of([0.3] * 3, [0.2] * 3)})
    assert data.mean == (0.3, 0.3, 0.3)
    assert data.splits["train"] is images
    data.follow_networks({"the network": DataConfig.of([0.3], [0.2])})
    assert {batch.images.shape[1] for batch in train_batches(data)} == {1}


@pytest.mark.parametrize("stage", [None, "fit"])
def test_images_of_different_sizes_are_refused_before_training(root: Path, stage: str | None) -> None:
    with pytest.raises(ValueError, match=r"set image_size to resize all images\.$"):
        ImageFolderDataModule(str(root)).setup(stage)


def test_a_trained_student_goes_before_its_teacher(root: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    student, teacher = resnet20(num_classes=2), resnet20(num_classes=2)
    set_data_config(student, STUDENT)
    set_data_config(teacher, TEACHER)
    data = ImageFolderDataModule(str(root), batch_size=5, val_fraction=0.25)
    module = DistillationModule(student, teacher, teacher_check="off")
    make_trainer(max_epochs=1).fit(module, data)
    assert (data.image_shape, data.mean, data.teacher_shape) == ((3, 24, 24), STUDENT.mean, (3, 40, 40))
