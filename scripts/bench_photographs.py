"""Measure augmented photographs per second, against torchvision's ImageFolder with transforms of the same distribution.

One process and one torch thread; the candidates alternate, and the median over the rounds is reported. Without --root
JPEG files of 500x375 pixels are made.

    python scripts/bench_photographs.py [--root my_images] [--size 160] [--batch-size 64] [--rounds 5]
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from timing import repeat, time_rounds
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kd_lightning import Augmentation, ImageFolderDataModule
from kd_lightning.data.photographs import IMAGENET_MEAN, IMAGENET_STD

COUNT = 128
PRESETS = {
    "crop and flip": Augmentation(preset="none", crop_scale=(0.35, 1.0), flip=True),
    "standard": Augmentation(preset="standard"),
    "strong": Augmentation(preset="strong"),
}


def main() -> None:
    """Print milliseconds an image and ratios for each preset and each way of reading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with train/<class>/")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or write_photographs(Path(folder))
        print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {options.size} pixels, one thread")
        for name, augmentation in PRESETS.items():
            print_preset(name, augmentation, root, options)


def print_preset(name: str, augmentation: Augmentation, root: Path, options: argparse.Namespace) -> None:
    """Print a line for each way of reading."""
    plain = endless(lambda: torchvision_loader(root, name, options))
    candidates: dict[str, Callable[[], object]] = {"torchvision": repeat(lambda: next(plain), 2)}
    ways: dict[str, dict[str, Any]] = {
        "memory": {},
        "file": {"cache": str(root / "decoded")},
        "no room": {"memory_limit": 0.0, "cache": "off"},
    }
    for place, settings in ways.items():
        batches = our_batches(root, augmentation, options, **settings)
        candidates[place] = repeat(lambda batches=batches: next(batches), 2)  # type: ignore[misc]
    seconds = time_rounds(candidates, options.rounds)
    each = {place: 1000 * median(times) / (2 * options.batch_size) for place, times in seconds.items()}
    for place, value in each.items():
        print(f"{name:<14} {place:<12} {value:6.2f} ms an image, {each['torchvision'] / value:5.1f} times torchvision")


def write_photographs(root: Path) -> Path:
    """Write JPEG files of 500x375 pixels with edges, gradients and noise, and return their folder."""
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        place = root / "train" / label
        place.mkdir(parents=True)
        for number in range(COUNT // 2):
            layers = [
                np.asarray(
                    Image.fromarray(generator.integers(0, 256, (375 // cell, 500 // cell, 3), dtype=np.uint8)).resize(
                        (500, 375), Image.Resampling.BICUBIC
                    ),
                    dtype=np.float32,
                )
                for cell in (125, 25, 5)
            ]
            mixed = 0.6 * layers[0] + 0.25 * layers[1] + 0.15 * layers[2]
            Image.fromarray(mixed.astype(np.uint8)).save(place / f"{number:03}.jpg", quality=90)
    return root


def torchvision_loader(root: Path, name: str, options: argparse.Namespace) -> DataLoader[Any]:
    """Return a loader of ImageFolder with transforms of the same distribution as a preset."""
    scale = (0.2, 1.0) if name == "strong" else (0.35, 1.0)
    steps: list[Any] = [v2.RandomResizedCrop(options.size, scale=scale), v2.RandomHorizontalFlip()]
    if name == "standard":
        steps.append(v2.TrivialAugmentWide())
    if name == "strong":
        steps += [v2.RandAugment(), v2.ColorJitter(0.2, 0.2, 0.2)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if name != "crop and flip":
        steps.append(v2.RandomErasing(0.1))
    mixing = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=2), v2.CutMix(alpha=1.0, num_classes=2)])

    def collate(samples: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(samples)
        return mixing(*batch) if name == "strong" else batch

    images = ImageFolder(str(root / "train"), v2.Compose(steps))
    return DataLoader(images, batch_size=options.batch_size, shuffle=True, drop_last=True, collate_fn=collate)


def our_batches(
    root: Path, augmentation: Augmentation, options: argparse.Namespace, **settings: Any
) -> Iterator[object]:
    """Yield augmented batches of the package's data module."""
    data = ImageFolderDataModule(
        str(root), image_size=options.size, batch_size=options.batch_size, augmentation=augmentation, **settings
    )
    data.setup("fit")
    return (data.augment(batch) for batch in endless(data.train_dataloader))


def endless(loader: Callable[[], DataLoader[Any]]) -> Iterator[Any]:
    """Yield the batches of a loader, epoch after epoch."""
    once = loader()
    epoch = 0
    while True:
        set_epoch = getattr(once.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        yield from once
        epoch += 1


if __name__ == "__main__":
    main()
