"""USPS, downloaded by torchvision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.datasets import USPS

from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.download import download
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.shapes import check_size, reshape, statistics


class USPSDataModule(ImageDataModule):
    """USPS: 7,291 training (a tenth of them for validation) and 2,007 test images of digits on mail, 16x16, grey.

    J. J. Hull: A Database for Handwritten Text Recognition Research, 1994

    Args:
        root: Folder of the two files, which are downloaded (8 MB) if they are missing, and whose MD5 is checked.
        batch_size: Images in a batch of one process.
        mean: Mean of the channel.
        std: Standard deviation of the channel.
        size: Height and width to which images are resized, once, when they are read; ``None`` for their own.
        channels: 3 for RGB, the grey channel repeated, for networks that take colour images.
        **options: Arguments of :class:`ImageDataModule`.

    Raises:
        DownloadError: If the files can be neither found nor downloaded.
        UserError: If an argument is outside its range.

    Example:
        >>> USPSDataModule("data", size=28).image_shape  # beside MNIST
        (1, 28, 28)
    """

    dataset = USPS
    classes = tuple("0123456789")
    default_augmentation = Augmentation(padding=1)  # a mirrored digit is another sign

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 64,
        mean: Sequence[float] = (0.2469,),
        std: Sequence[float] = (0.2989,),
        size: int | None = None,
        channels: Literal[1, 3] = 1,
        **options: Any,
    ) -> None:
        check_size(size)
        super().__init__(
            batch_size=batch_size,
            mean=statistics(mean, channels=channels),
            std=statistics(std, channels=channels),
            **options,
        )
        self.save_hyperparameters({"root": root, "size": size, "channels": channels})
        self.root = str(Path(root).expanduser())
        self.size = (size or 16, size or 16)

    def prepare_data(self) -> None:
        """Download the files unless they are there and complete."""
        for url, name, md5 in self.dataset.split_list.values():
            download(url, root=self.root, name=name, md5=md5)

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation split, and ``predict`` shows the test images."""
        if split == "val":
            return None
        images = self.dataset(self.root, train=split == "train")
        pixels = reshape(torch.from_numpy(images.data)[:, None], size=self.size, channels=len(self.mean))
        return ImageSet(torch.tensor(images.targets), pixels)
