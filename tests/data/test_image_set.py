"""Stored images: how files are decoded and batches are fetched."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kd_lightning.data.batch import RawBatch
from kd_lightning.data.image_form import OriginalForm
from kd_lightning.data.image_set import ImageFiles, ImageSet, StreamedImages, Subset, read_image
from kd_lightning.data.packed_images import stack_in_memory


def random_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def save_image(folder: Path, pixels: np.ndarray, name: str = "a.png") -> Path:
    Image.fromarray(pixels).save(folder / name)
    return folder / name


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff"])
def test_lossless_files_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    pixels = random_pixels(5, 7)
    assert torch.equal(read_image(save_image(tmp_path, pixels, f"a.{suffix}")), as_tensor(pixels))


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    pixels = random_pixels(4, 6)
    grey = read_image(save_image(tmp_path, pixels[:, :, 0]))
    assert torch.equal(grey, as_tensor(pixels[:, :, :1]).expand(3, -1, -1))
    palette = Image.fromarray(pixels[:, :, :3]).quantize(16)
    palette.save(tmp_path / "p.png")
    assert torch.equal(read_image(tmp_path / "p.png"), as_tensor(np.array(palette.convert("RGB"))))


@pytest.mark.parametrize("damage", ["empty", "text", "half", "header"])
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = save_image(tmp_path, random_pixels(16, 16))
    content = path.read_bytes()
    damaged = {"empty": b"", "text": b"not an image", "half": content[: len(content) // 2], "header": content[:20]}
    path.write_bytes(damaged[damage])
    expected = f"{str(path)!r} cannot be read as an image; fix or remove it."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        read_image(path)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_grey_images_of_more_than_eight_bits_are_refused(tmp_path: Path, kind: type) -> None:
    path = save_image(tmp_path, (random_pixels(4, 4, 1)[:, :, 0] * 200.0).astype(kind), "deep.tiff")
    with pytest.raises(ValueError, match=r"deep\.tiff' has more than 8 bits a pixel of grey; save it with 8 bits\.$"):
        read_image(path)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [save_image(tmp_path, random_pixels(4, 5, seed=i), f"{i}.png") for i in range(5)]


def image_files(files: list[Path]) -> ImageFiles:
    return ImageFiles(torch.arange(5) * 10, files, torch.tensor([[4, 5]] * 5), OriginalForm(4, 5))


def test_images_in_memory_equal_streamed_ones(files: list[Path]) -> None:
    images = image_files(files)
    resident = stack_in_memory(images)
    assert torch.equal(resident.pixels, torch.stack([as_tensor(random_pixels(4, 5, seed=i)) for i in range(5)]))
    streamed = StreamedImages(images, (4, 5)).stream(torch.tensor([3, 0, 3]), 0)
    assert torch.equal(streamed.pixels, resident.pixels[[3, 0, 3]])
    assert torch.equal(resident.labels, images.labels)
    assert (list(resident.files), resident.size) == (files, (4, 5))


def test_sample_names_are_files_or_numbers(files: list[Path]) -> None:
    assert image_files(files).name(2) == str(files[2])
    assert ImageSet(torch.arange(5), torch.zeros(5, 1, 2, 2, dtype=torch.uint8)).name(2) == "2"


@pytest.mark.parametrize("resident", [True, False])
def test_a_subset_keeps_the_sample_numbers_of_the_full_set(files: list[Path], resident: bool) -> None:
    streamed = StreamedImages(image_files(files), (4, 5))
    images = stack_in_memory(streamed.images) if resident else streamed
    part = Subset(images, torch.tensor([4, 2, 1]), split="train")
    batch, single = part.__getitems__([(2, 7), (0, 7)]), part[1, -1]
    assert len(part) == 3
    assert isinstance(batch, RawBatch)
    assert isinstance(single, RawBatch)
    assert (batch.ids.tolist(), batch.labels.tolist(), batch.epoch, batch.split) == ([1, 4], [10, 40], 7, "train")
    expected = torch.empty(2, 0) if resident else streamed.stream(torch.tensor([1, 4]), -1).pixels
    assert torch.equal(batch.pixels, expected)
    assert (single.ids.tolist(), single.epoch) == ([2], -1)
