"""A user's own images in folders, from files that the tests write."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grouped_options import grouped
from PIL import Image
from reading import in_epoch, in_memory
from torch import Tensor

from kd_lightning.data import Augmentation, Batch, ImageFolderDataModule
from kd_lightning.data.image_set import ImageSet, StreamedImages
from kd_lightning.errors import UserError


def write_image(file: Path, size: tuple[int, int] = (6, 8), mode: str = "RGB") -> Path:
    """Write an image of (height, width) with noise that depends on the name of the file and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, f"{file.parent.name}/{file.name}"))
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)
    image = Image.fromarray(noise if "A" in mode else noise[:, :, :3])
    image.convert(mode).save(file)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, count in (("ant", 6), ("bee", 10)):
        for i in range(count):
            write_image(tmp_path / "train" / name / f"{i:02}.png")
        for i in range(3):
            write_image(tmp_path / "test" / name / f"{i}.png")
    return tmp_path


def read_pixels(file: Path, size: tuple[int, int] | None = None) -> Tensor:
    with Image.open(file) as image:
        rgb = image.convert("RGB")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            rgb = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if size is not None:
        rgb = rgb.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def batches(data: ImageFolderDataModule, split: str, epoch: int = 0) -> list[Batch]:
    loader = getattr(data, f"{split}_dataloader")()
    loader.sampler.set_epoch(epoch)
    return [data.augment(batch) for batch in loader]


def test_folders_are_classes_and_pixels_are_read_exactly(root: Path) -> None:
    data = ImageFolderDataModule(str(root), **grouped(preset="none"))
    data.setup("fit")
    images = in_memory(data.splits["train"])
    assert set(data.splits) == {"train"}
    assert data.classes == ("ant", "bee")
    assert data.image_shape == (3, 6, 8)
    assert [str(file.relative_to(root / "train")) for file in images.files] == (
        [f"ant/{i:02}.png" for i in range(6)] + [f"bee/{i:02}.png" for i in range(10)]
    )
    assert images.labels.tolist() == [0] * 6 + [1] * 10
    assert torch.equal(images.pixels, torch.stack([read_pixels(file) for file in images.files]))
    assert data.image_name("train", 7) == str(root / "train" / "bee" / "01.png")


def test_without_a_validation_folder_a_fraction_of_each_class_is_split_off(root: Path) -> None:
    data = ImageFolderDataModule(str(root), val_fraction=0.5, batch_size=4)
    val = torch.cat([batch.ids for batch in batches(data, "val")])
    train = torch.cat([batch.ids for batch in batches(data, "train")])
    assert data.splits["train"].labels[val].bincount().tolist() == [3, 5]
    assert sorted(torch.cat([train, val]).tolist()) == list(range(16))


def test_with_a_validation_folder_all_training_images_are_used(root: Path) -> None:
    files = [write_image(root / "val" / name / "v.png") for name in ("ant", "bee")]
    data = ImageFolderDataModule(str(root), batch_size=16)
    assert sorted(batches(data, "train")[0].ids.tolist()) == list(range(16))
    (val,) = batches(data, "val")
    assert val.labels.tolist() == [0, 1]
    assert [data.image_name("val", sample) for sample in val.ids.tolist()] == [str(file) for file in files]


@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_images_to_predict_are_found_at_any_depth_and_are_unlabelled(root: Path, memory_limit: float) -> None:
    files = [write_image(root / "predict" / place) for place in ("a.png", "more/b.PNG", "more/still/c.jpg")]
    (root / "predict" / "notes.txt").write_text("no image")
    data = ImageFolderDataModule(str(root), memory_limit=memory_limit)
    with pytest.warns(UserWarning, match=r"^1 file of .*predict' is left out, .*: 1 \.txt\.$"):
        data.setup("predict")
    (batch,) = batches(data, "predict")
    assert batch.labels.tolist() == [-1, -1, -1]
    assert batch.ids.tolist() == [0, 1, 2]
    assert [data.image_name("predict", i) for i in range(3)] == [str(file) for file in files]
    assert "test" not in data.splits


def test_prediction_needs_no_other_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "predict" / "a.png")
    data = ImageFolderDataModule(str(tmp_path))
    data.setup("predict")
    assert batches(data, "predict")[0].labels.tolist() == [-1]


def test_prediction_uses_the_test_images_if_there_is_no_predict_folder(root: Path) -> None:
    data = ImageFolderDataModule(str(root))
    assert [batch.ids.tolist() for batch in batches(data, "predict")] == [list(range(6))]
    assert data.image_name("predict", 4) == str(root / "test" / "bee" / "1.png")


@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_images_of_different_sizes_are_resized_to_image_size(root: Path, memory_limit: float) -> None:
    odd = write_image(root / "train" / "ant" / "odd.png", size=(9, 5))
    data = ImageFolderDataModule(str(root), image_size=7, memory_limit=memory_limit)
    data.setup("fit")
    assert data.image_shape == (3, 7, 7)
    images = data.splits["train"]
    assert isinstance(images, StreamedImages)
    (shown,) = images.stream(torch.tensor([6]), -1).pixels
    assert torch.equal(shown, read_pixels(odd, (12, 7))[:, 2:9])  # 9x5 with a shorter side of 7, and its centre
    assert {batch.images.shape[2:] for batch in batches(data, "train")} == {(7, 7)}


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_other_colour_modes_become_rgb(root: Path, mode: str) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    file = write_image(root / "train" / "ant" / f"other.{suffix}", mode=mode)
    with Image.open(file) as image:
        assert image.mode == mode
    images = in_memory(ImageFolderDataModule(str(root)).load("train"))
    assert images.pixels.shape == (17, 3, 6, 8)
    assert torch.equal(images.pixels[6], read_pixels(file))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("alphas", [{}, {"mixup": 0.4, "cutmix": 1.0}], ids=["plain", "mixed"])
def test_streamed_batches_equal_those_in_memory(root: Path, workers: int, alphas: dict[str, float]) -> None:
    options: dict[str, Any] = grouped(batch_size=4, val_fraction=0.3, padding=2, **alphas)
    resident = ImageFolderDataModule(str(root), **options)
    streamed = ImageFolderDataModule(str(root), memory_limit=0.0, cache="off", num_workers=workers, **options)
    for split, epoch in (("train", 0), ("train", 3), ("val", 0), ("test", 0), ("predict", 0)):
        ours, theirs = batches(resident, split, epoch), batches(streamed, split, epoch)
        assert len(ours) == len(theirs) > 0
        for first, second in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert [isinstance(images, ImageSet) for images in resident.splits.values()] == [True] * 3
    assert [isinstance(images, StreamedImages) for images in streamed.splits.values()] == [True] * 3
    assert resident.image_shape == streamed.image_shape == (3, 6, 8)


def test_the_memory_limit_covers_all_that_is_kept(root: Path) -> None:
    data = ImageFolderDataModule(str(root), **grouped(padding=1))
    data.setup("fit")
    batches(data, "train")
    kept = sum(images.nbytes for images in data.augmenter.device_images.values())
    kept += in_memory(data.splits["train"]).pixels.nbytes
    for limit, resident in ((kept / 2**30, True), ((kept - 1) / 2**30, False)):
        images = ImageFolderDataModule(str(root), **grouped(padding=1, memory_limit=limit)).load("train")
        assert isinstance(images, ImageSet) == resident


@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_images_of_different_sizes_are_refused_by_name(root: Path, memory_limit: float) -> None:
    odd = write_image(root / "train" / "bee" / "99.png", size=(9, 5))
    first = root / "train" / "ant" / "00.png"
    expected = f"{str(odd)!r} has 5x9 pixels and {str(first)!r} 8x6; set image_size to resize all images."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ImageFolderDataModule(str(root), memory_limit=memory_limit).setup("fit")


def test_an_empty_class_folder_is_refused(root: Path) -> None:
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    folder = str(root / "train" / "cat")
    expected = f"The class folder {folder!r} holds no images that Pillow reads (1 .txt); fill or remove it."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ImageFolderDataModule(str(root)).setup("fit")


@pytest.mark.parametrize("image_size", [None, 4])
@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x05IHDR", b"P6 1\x112 1 255 "]
)
def test_an_unreadable_image_is_refused_by_name_in_setup(
    root: Path, content: bytes, memory_limit: float, image_size: int | None
) -> None:
    bad = root / "train" / "bee" / ("05.ppm" if content[:1] == b"P" else "05.png")
    bad.write_bytes(content)
    expected = f"{str(bad)!r} cannot be read as an image; fix or remove it."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ImageFolderDataModule(str(root), image_size=image_size, memory_limit=memory_limit).setup("fit")


def test_a_truncated_image_is_refused_by_name(root: Path) -> None:
    bad = root / "train" / "bee" / "05.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"^{re.escape(repr(str(bad)))} cannot be read as an image"):
        ImageFolderDataModule(str(root)).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_streamed_image_is_refused_by_name(root: Path, workers: int) -> None:
    bad = root / "test" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = ImageFolderDataModule(str(root), memory_limit=0.0, cache="off", num_workers=workers)
    data.setup("test")
    with pytest.raises(
        ValueError, match=f"^{re.escape(repr(str(bad)))} cannot be read as an image; fix or remove it.$"
    ):
        batches(data, "test")


@pytest.mark.parametrize("preset", ["standard", "strong"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_truncated_image_among_random_crops_is_refused_by_name(root: Path, preset: str, batch_size: int) -> None:
    bad = root / "train" / "bee" / "05.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = ImageFolderDataModule(
        str(root),
        image_size=8,
        memory_limit=0.0,
        cache="off",
        batch_size=batch_size,
        augmentation=Augmentation(preset=preset),
    )
    data.setup("fit")
    expected = f"{str(bad)!r} cannot be read as an image; fix or remove it."
    loaders = [in_epoch(data.train_dataloader(), epoch) for epoch in range(3)]
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        [batch for loader in loaders for batch in loader]


def test_a_decompression_bomb_is_refused_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"00\.png' cannot be read as an image"):
        ImageFolderDataModule(str(root), memory_limit=0.0, cache="off").setup("fit")


def test_missing_folders_are_refused_by_name(root: Path) -> None:
    shutil.rmtree(root / "test")
    for stage, split in (("test", "test"), ("predict", "test")):
        expected = f"There is no folder {str(root / split)!r}; put images into {split}/<class>/."
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(expected)}$"):
            ImageFolderDataModule(str(root)).setup(stage)
    (root / "predict").mkdir()
    with pytest.raises(ValueError, match=r"predict' holds no images that Pillow reads; put"):
        ImageFolderDataModule(str(root)).setup("predict")
    shutil.rmtree(root / "train" / "ant")
    shutil.rmtree(root / "train" / "bee")
    with pytest.raises(ValueError, match=r"train' has no class folders; put images into train/<class>/\.$"):
        ImageFolderDataModule(str(root)).setup("fit")
    shutil.rmtree(root / "train")
    with pytest.raises(FileNotFoundError, match=r"train'; put images into train/<class>/\.$"):
        ImageFolderDataModule(str(root)).setup("fit")
    with pytest.raises(
        FileNotFoundError, match=r"^There is no folder .*none'; set root to the folder of your images\.$"
    ):
        ImageFolderDataModule(str(root / "none")).num_classes  # noqa: B018


@pytest.mark.parametrize("split", ["val", "test"])
def test_splits_with_different_classes_are_refused_by_name(root: Path, split: str) -> None:
    write_image(root / split / "ant" / "a.png")
    write_image(root / split / "wasp" / "a.png")
    differing = "wasp" if split == "test" else "bee, wasp"
    expected = f"The class folders of {str(root / split)!r} differ from the others: {differing}."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ImageFolderDataModule(str(root)).setup("validate" if split == "val" else split)


def test_hidden_folders_are_not_classes(root: Path) -> None:
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert ImageFolderDataModule(str(root)).classes == ("ant", "bee")


def test_testing_needs_no_training_folder(root: Path) -> None:
    shutil.rmtree(root / "train")
    data = ImageFolderDataModule(str(root))
    assert [batch.labels.tolist() for batch in batches(data, "test")] == [[0, 0, 0, 1, 1, 1]]


# --- channels


@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_with_one_mean_colours_become_grey_by_luma(root: Path, memory_limit: float) -> None:
    data = ImageFolderDataModule(str(root), mean=[0.5], std=[0.25], memory_limit=memory_limit)
    assert data.image_shape == (1, 6, 8)
    (batch,) = batches(data, "test")
    files = [Path(data.image_name("test", sample)) for sample in batch.ids.tolist()]
    grey = [np.array(Image.open(file).convert("L")) for file in files]
    expected = (torch.from_numpy(np.stack(grey))[:, None] / 255 - 0.5) / 0.25
    assert torch.allclose(batch.images, expected, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_refused(root: Path, channels: int) -> None:
    expected = f"read with 3 channels, or 1 for grey, but mean has {channels} values; give 3 or 1"
    with pytest.raises(ValueError, match=expected):
        ImageFolderDataModule(str(root), mean=[0.5] * channels, std=[0.25] * channels)


# --- orientation, formats and broken files


def test_the_size_is_that_of_the_turned_image(root: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    for name in ("ant", "bee"):
        with Image.open(root / "train" / name / "00.png") as image:
            upright = image.convert("RGB")
        upright.transpose(Image.Transpose.ROTATE_90).save(root / "train" / name / "00.png", exif=exif)
        pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
        images = in_memory(ImageFolderDataModule(str(root)).load("train"))
        assert torch.equal(images.pixels[0 if name == "ant" else 6], pixels)


@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_an_orientation_behind_the_pixels_is_not_resized_in_silence(root: Path, memory_limit: float) -> None:
    file = root / "train" / "ant" / "00.png"
    exif = Image.Exif()
    exif[0x112] = 6
    write_image(file)
    with Image.open(file) as image:
        image.save(file, exif=exif)
    written = file.read_bytes()
    start, end = written.index(b"eXIf") - 4, written.index(b"IEND") - 4
    length = int.from_bytes(written[start : start + 4], "big") + 12
    moved = written[:start] + written[start + length : end] + written[start : start + length] + written[end:]
    file.write_bytes(moved)
    data = ImageFolderDataModule(str(root), memory_limit=memory_limit, batch_size=16, val_fraction=0.2)
    with pytest.raises(ValueError, match=r"00\.png' has 6x8 pixels and the others 8x6; set image_size to resize all"):
        batches(data, "train") + batches(data, "val")


def test_all_formats_of_a_class_are_read(root: Path) -> None:
    names = ["a.JPG", "b.jfif", "c.gif", "d.webp", "e.tif", "f.bmp"]
    for name in names:
        write_image(root / "train" / "ant" / name)
    images = in_memory(ImageFolderDataModule(str(root)).load("train"))
    assert {file.name for file in images.files} >= set(names)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_broken_files_are_named_at_once(root: Path, memory_limit: float, workers: int) -> None:
    broken = [root / "test" / name for name in ("ant/0.png", "bee/2.png")]
    for file in broken:
        file.write_bytes(file.read_bytes()[:60])
    data = ImageFolderDataModule(str(root), memory_limit=memory_limit, num_workers=workers)
    sentences = " ".join(f"{str(file)!r} cannot be read as an image; fix or remove it." for file in broken)
    with pytest.raises(ValueError, match=f"^2 of 6 images cannot be read. {re.escape(sentences)}$"):
        batches(data, "test")


def test_a_broken_test_image_is_named_before_training(root: Path) -> None:
    file = root / "test/bee/2.png"
    file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^'.*test/bee/2\.png' cannot be read as an image; fix or remove it\.$"):
        ImageFolderDataModule(str(root)).setup("fit")


@pytest.mark.parametrize("seed", range(6))  # in some of these the image is one to test on
def test_a_broken_image_of_one_set_is_named_before_training(root: Path, seed: int) -> None:
    (root / "train/ant/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"train/ant/0\.png' cannot be read as an image; fix or remove it\.$"):
        ImageFolderDataModule(str(root / "train"), split_seed=seed).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_prediction_leaves_out_broken_files_and_names_them(root: Path, memory_limit: float, workers: int) -> None:
    files = [write_image(root / "predict" / f"{i}.png") for i in range(5)]
    files[1].write_bytes(b"no image")
    files[3].write_bytes(files[3].read_bytes()[:60])
    (root / "predict" / "._0.png").write_bytes(b"what macOS leaves behind")
    data = ImageFolderDataModule(str(root), memory_limit=memory_limit, num_workers=workers, batch_size=2)
    with pytest.warns(UserWarning, match="^Left out: ") as told:
        found = batches(data, "predict")
    assert [re.findall(r"(\d)\.png", str(warning.message)) for warning in told] == [["1"], ["3"]]
    names = [data.image_name("predict", sample) for batch in found for sample in batch.ids.tolist()]
    assert names == [str(files[i]) for i in (0, 2, 4)]
    shown = torch.cat([batch.images for batch in found])
    (root / "predict" / "1.png").unlink()
    (root / "predict" / "3.png").unlink()
    whole = torch.cat([batch.images for batch in batches(ImageFolderDataModule(str(root)), "predict")])
    assert torch.equal(shown, whole)


def test_a_batch_of_broken_files_only_is_left_out(root: Path) -> None:
    files = [write_image(root / "predict" / f"{i}.png") for i in range(4)]
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:60])
    data = ImageFolderDataModule(str(root), memory_limit=0.0, cache="off", batch_size=2, image_size=6)
    with pytest.warns(UserWarning, match="^Left out: 2 of 2 images cannot be read"):
        assert [batch.ids.tolist() for batch in batches(data, "predict")] == [[2, 3]]


@pytest.mark.parametrize("memory_limit", [4.0, 0.0])
def test_prediction_of_broken_files_only_is_refused(root: Path, memory_limit: float) -> None:
    write_image(root / "predict" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png' cannot be read as an image; fix or remove it\.$"):
        ImageFolderDataModule(str(root), memory_limit=memory_limit).setup("predict")
