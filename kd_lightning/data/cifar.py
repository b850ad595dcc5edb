"""CIFAR-10 and CIFAR-100, downloaded and checked by torchvision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.download import downloading
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule

_FINE_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""  # alphabetical, as the labels number them


class _CIFARDataModule(ImageDataModule):
    """Either of the two.

    Args:
        root: Folder of the archive, which is downloaded (170 MB) if it is missing, and whose MD5 is checked.
        **options: Arguments of :class:`ImageDataModule`.
    """

    dataset: type[CIFAR10]
    size = (32, 32)
    default_augmentation = Augmentation(padding=4, flip=True)

    def __init__(self, root: str = "data", **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters({"root": root})
        self.root = str(Path(root).expanduser())

    def prepare_data(self) -> None:
        """Download the archive unless it is there and complete."""
        with downloading(self.dataset.url, Path(self.root, self.dataset.filename)):
            self.dataset(self.root, download=True)

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation split, and ``predict`` shows the test images."""
        if split == "val":
            return None
        images = self.dataset(self.root, train=split == "train")
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(torch.tensor(images.targets, dtype=torch.int64), pixels)


class CIFAR10DataModule(_CIFARDataModule):
    """CIFAR-10: 50,000 training (5,000 of them for validation) and 10,000 test images, 32x32, 10 classes.

    A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html

    Args:
        root: Folder of the archive, which is downloaded (170 MB) if it is missing, and whose MD5 is checked.
        mean: Mean of each channel; the default is the one in wide use, as for ``std``.
        std: Standard deviation of each channel.
        **options: Arguments of :class:`ImageDataModule`; by default images are padded by 4 pixels and flipped.

    Raises:
        DownloadError: If the archive can be neither found nor downloaded.
        UserError: If an argument is outside its range.

    Example:
        >>> data = CIFAR10DataModule("data", batch_size=256, views=8)
        >>> data.num_classes, data.image_shape, data.augmentation.padding
        (10, (3, 32, 32), 4)
    """

    dataset = CIFAR10
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(
        self,
        root: str = "data",
        *,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2023, 0.1994, 0.2010),
        **options: Any,
    ) -> None:
        super().__init__(root, mean=mean, std=std, **options)


class CIFAR100DataModule(_CIFARDataModule):
    """CIFAR-100: 50,000 training (5,000 of them for validation) and 10,000 test images, 32x32, 100 classes.

    Args:
        root: Folder of the archive, which is downloaded (170 MB) if it is missing, and whose MD5 is checked.
        mean: Mean of each channel; the default is the one in wide use for CIFAR-100, as for ``std``.
        std: Standard deviation of each channel.
        **options: Arguments of :class:`ImageDataModule`; by default images are padded by 4 pixels and flipped.

    Raises:
        DownloadError: If the archive can be neither found nor downloaded.
        UserError: If an argument is outside its range.

    Example:
        >>> data = CIFAR100DataModule("data", batch_size=64)
        >>> data.num_classes, data.classes[:3]
        (100, ('apple', 'aquarium_fish', 'baby'))
    """

    dataset = CIFAR100
    classes = tuple(_FINE_CLASSES.split())

    def __init__(
        self,
        root: str = "data",
        *,
        mean: Sequence[float] = (0.5071, 0.4867, 0.4408),
        std: Sequence[float] = (0.2675, 0.2565, 0.2761),
        **options: Any,
    ) -> None:
        super().__init__(root, mean=mean, std=std, **options)
