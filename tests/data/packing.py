"""Photographs of several sizes and orientations as files, read in the form in which random crops are cut from them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kd_lightning.data.image_form import ShrunkForm
from kd_lightning.data.image_set import ImageFiles
from kd_lightning.files.images import shown_size

SHAPES = [(40, 56), (61, 33), (30, 30), (90, 44), (5, 200)]


def write_photographs(folder: Path, count: int = 16) -> list[Path]:
    """Write JPEG files, each eighth with one EXIF orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        height, width = SHAPES[number % len(SHAPES)]
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        files.append(folder / f"{number:03}.jpg")
        Image.fromarray(noise).save(files[-1], exif=exif, quality=95)
    return files


def source_of(files: list[Path], *, side: int = 28, skip_unreadable: bool = False) -> ImageFiles:
    """Return the images of files; the sizes of damaged ones are as if they had 40x40 pixels."""
    sizes = [shown_size(file) if file.stat().st_size > 100 else (40, 40) for file in files]
    return ImageFiles(
        torch.arange(len(files)),
        files,
        torch.tensor(sizes),
        ShrunkForm(side, "bilinear"),
        skip_unreadable=skip_unreadable,
    )
