"""CIFAR-10 and CIFAR-100, downloaded and checked by torchvision."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from kd_lightning.data.download import downloading
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training (5,000 of them for validation) and 10,000 test images, 32x32, 10 classes.

    A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html

    Args:
        root: Folder of the downloaded archive; it is downloaded (170 MB) if it is not there, and its MD5 checked.
        batch_size: Images of a batch, of one process.
        val_fraction: Share of the training images of each class that is validated on.
        seed: Of the order of samples.
        view_seed: Of the augmentation.
        padding: Pixels on each side for the random crop.
        flip: Whether half of the training images are mirrored.
        mean: Of each channel; the default is the one in wide use, as for ``std``.
        std: Standard deviation of each channel.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        num_workers: 0 is best: the images live on the device.
        views: V fixed views of each image in turn; ``None`` for a new one in each epoch.
        split_seed: Of the split; ``seed`` if ``None``.

    Raises:
        ConnectionError: If the archive can be neither found nor downloaded.
        ValueError: If an argument lies outside its range.
    """

    dataset = CIFAR10
    size = (32, 32)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        view_seed: int = 0,
        padding: int = 4,
        flip: bool = True,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2023, 0.1994, 0.2010),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_workers: int = 0,
        views: int | None = None,
        split_seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size, val_fraction, seed, view_seed, padding, flip, mean, std, mixup, cutmix, num_workers, views,
            split_seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self.root = root

    def prepare_data(self) -> None:
        """Download the archive unless it is there and whole."""
        _download(self.dataset, self.root)

    @property
    def classes(self) -> tuple[str, ...]:
        """The ten class names."""
        return ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation set of its own, and ``predict`` shows the test images."""
        return None if split == "val" else _read(self.dataset(self.root, train=split == "train"))


class CIFAR100DataModule(ImageDataModule):
    """CIFAR-100: 50,000 training (5,000 of them for validation) and 10,000 test images, 32x32, 100 classes.

    Args:
        root: See :class:`CIFAR10DataModule`, as for all other arguments.
        batch_size: See there.
        val_fraction: See there.
        seed: See there.
        view_seed: See there.
        padding: See there.
        flip: See there.
        mean: The one in wide use for CIFAR-100, as for ``std``.
        std: See ``mean``.
        mixup: See there.
        cutmix: See there.
        num_workers: See there.
        views: See there.
        split_seed: See there.

    Raises:
        ConnectionError: If the archive can be neither found nor downloaded.
        ValueError: If an argument lies outside its range.
    """

    dataset = CIFAR100
    size = (32, 32)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        view_seed: int = 0,
        padding: int = 4,
        flip: bool = True,
        mean: Sequence[float] = (0.5071, 0.4867, 0.4408),
        std: Sequence[float] = (0.2675, 0.2565, 0.2761),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_workers: int = 0,
        views: int | None = None,
        split_seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size, val_fraction, seed, view_seed, padding, flip, mean, std, mixup, cutmix, num_workers, views,
            split_seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self.root = root

    def prepare_data(self) -> None:
        """Download the archive unless it is there and whole."""
        _download(self.dataset, self.root)

    @property
    def classes(self) -> tuple[str, ...]:
        """The hundred fine class names, alphabetical as in the labels."""
        return tuple(_FINE_CLASSES.split())

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation set of its own, and ``predict`` shows the test images."""
        return None if split == "val" else _read(self.dataset(self.root, train=split == "train"))


def _download(dataset: type[CIFAR10], root: str) -> None:
    with downloading(dataset.url, Path(root, dataset.filename)):
        dataset(root, download=True)


def _read(images: CIFAR10) -> ImageSet:
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(torch.tensor(images.targets, dtype=torch.int64), pixels)


_FINE_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""
