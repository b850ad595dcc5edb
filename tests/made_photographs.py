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


COLOURS = {"blue": (40, 60, 230), "green": (30, 200, 60), "red": (230, 40, 40)}
"""The classes of photographs of several classes, sorted, and the colour of each."""


def write_several_classes(folder: Path, count: int = 60, *, unlabelled: int = 0, size: int = 32) -> Path:
    """Write photographs with patches of several colours, and ``labels.csv``, which names the colours of each.

    Red is in half of them, green in a third and blue in a fifth; some have none.
    """
    random, rows = np.random.default_rng(0), ["file,label"]
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        image = photograph(size + number % 5, size + 6 - number % 7, seed=number).convert("L").convert("RGB")
        shown = [name for name, step in {"blue": 5, "green": 3, "red": 2}.items() if number % step == 0]
        for name in shown:
            x, y = random.integers(0, size - 12, 2).tolist()
            image.paste(COLOURS[name], (x, y, x + 12, y + 12))
        image.save(folder / "images" / f"{number:03}.png")
        label = "" if number >= count - unlabelled else ";".join(shown) or "-"
        rows.append(f"images/{number:03}.png,{label}")
    (folder / "labels.csv").write_text("\n".join([*rows, ""]))
    return folder
