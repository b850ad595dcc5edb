"""Photographs that tests make: smooth colours, so that filters differ, with fine noise, so that every pixel counts."""

from pathlib import Path

import numpy as np
from PIL import Image


def photograph(height: int, width: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Return a made photograph."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + random.integers(-20, 21, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def write_photographs(folder: Path, classes: list[str], count: int = 10) -> Path:
    """Write photographs of several sizes into a folder for each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = photograph(60 + 3 * number, 90 - 4 * number, seed=100 * label + number)
            image.save(folder / name / f"{number}.jpg")
    return folder
