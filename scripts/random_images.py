"""Random images of CIFAR-10's size for the benchmarks: speed does not depend on their contents."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from stepwise_fit import quiet_trainer
from torch import Tensor

from kd_lightning.data.augmentation import Augmentation
from kd_lightning.data.batch import Batch
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
COUNT = 20_000
T = TypeVar("T")


def random_images(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Return uint8 images ``(N, 3, 32, 32)`` and labels of ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


class RandomImages(ImageDataModule):
    """Random images in memory, cropped and flipped as CIFAR-10's are."""

    def __init__(self, batch_size: int, views: int | None = None, count: int = COUNT) -> None:
        augmentation = Augmentation(padding=4, flip=True)
        super().__init__(mean=MEAN, std=STD, augmentation=augmentation, batch_size=batch_size, views=views)
        self.count = count

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return tuple(map(str, range(10)))

    def load(self, split: str) -> ImageSet | None:
        """Return the images of a split."""
        images, labels = random_images(self.count if split == "train" else 256)
        return ImageSet(labels, images)

    def augmented_batches(self, device: torch.device) -> Iterator[Batch]:
        """Return endless training batches, moved to a device and augmented there, as in ``Trainer.fit``."""
        # whose device is where an epoch's order and crops are placed
        self.trainer = quiet_trainer(device.type, max_epochs=1)
        for batch in endless(self.train_dataloader()):
            yield self.augment(batch._replace(labels=batch.labels.to(device), ids=batch.ids.to(device)))


def endless(loader: Iterable[T]) -> Iterator[T]:
    """Return the batches of a loader, epoch after epoch."""
    while True:
        yield from loader
