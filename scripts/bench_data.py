"""Augmented images a second: the batched pipeline, per-image PIL transforms, and the bound.

The bound takes images by an index and normalises them, with no augmentation. One torch thread (the loader has two
worker processes too); the three take turns in one process, and the median of the rounds counts.

    python scripts/bench_data.py [--batch-size 128] [--rounds 7] [--device cpu]
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torchvision
from bench_baseline import MEAN, STD, endless, plain_loader, random_images
from timing import repeat, time_rounds

from kd_lightning.data.augmentation import Augmentation
from kd_lightning.data.batch import RawBatch
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule

COUNT = 20_000


class RandomImages(ImageDataModule):
    """Images in memory, as CIFAR-10's are."""

    def __init__(self, batch_size: int, views: int | None = None, count: int = COUNT) -> None:
        augmentation = Augmentation(padding=4, flip=True)
        super().__init__(mean=MEAN, std=STD, augmentation=augmentation, batch_size=batch_size, views=views)
        self.count = count

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(10)))

    def load(self, split: str) -> ImageSet | None:
        images, labels = random_images(self.count if split == "train" else 256)
        return ImageSet(labels, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    data = RandomImages(options.batch_size)
    ours = endless(data.train_dataloader())
    plain = endless(plain_loader(*random_images(COUNT), options.batch_size))
    images = random_images(COUNT)[0].to(device)
    scale = torch.tensor([1 / (255 * s) for s in STD], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=device)[:, None, None]

    def bound() -> torch.Tensor:
        return images[torch.randint(COUNT, (options.batch_size,), device=device)].mul(scale).add_(shift)

    def batched() -> object:
        stored = next(ours)
        assert isinstance(stored, RawBatch)
        return data.augment(stored._replace(labels=stored.labels.to(device), ids=stored.ids.to(device)))

    sides: dict[str, tuple[Callable[[], object], int]] = {
        "batched (ours)": (batched, 100),
        "per image, PIL": (lambda: next(plain)[0].to(device), 20),
        "bound": (bound, 100),
    }
    seconds = time_rounds({name: repeat(batch, batches) for name, (batch, batches) in sides.items()}, options.rounds)
    rates = {name: [sides[name][1] * options.batch_size / each for each in found] for name, found in seconds.items()}
    median = {name: statistics.median(found) for name, found in rates.items()}
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"batch {options.batch_size}, {options.device}, one thread"
    )
    for name, found in rates.items():
        print(f"{name:<16}{median[name]:>12,.0f} images/s   ({min(found):,.0f} to {max(found):,.0f})")
    print(f"ours / PIL   {median['batched (ours)'] / median['per image, PIL']:.1f}")
    print(f"ours / bound {median['batched (ours)'] / median['bound']:.2f}")


if __name__ == "__main__":
    main()
