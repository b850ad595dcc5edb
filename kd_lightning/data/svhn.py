"""SVHN, downloaded and checked by torchvision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.datasets import SVHN

from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.download import download
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.shapes import check_size, reshape, statistics


class SVHNDataModule(ImageDataModule):
    """SVHN: 73,257 training (a tenth of them for validation) and 26,032 test images of house numbers' digits, 32x32.

    Y. Netzer et al.: Reading Digits in Natural Images with Unsupervised Feature Learning, 2011,
    http://ufldl.stanford.edu/housenumbers

    Args:
        root: Folder of the two files, which are downloaded (246 MB) if they are missing, and whose MD5 is checked.
        batch_size: Images in a batch of one process.
        mean: Mean of each channel; that of grey images is computed from it, as for ``std``.
        std: Standard deviation of each channel.
        size: Height and width to which images are resized, once, when they are read; ``None`` for their own.
        channels: 1 for grey images.
        **options: Arguments of :class:`ImageDataModule`.

    Raises:
        DownloadError: If the files can be neither found nor downloaded.
        UserError: If an argument is outside its range.

    Example:
        >>> SVHNDataModule("data", size=28, channels=1).image_shape  # beside MNIST
        (1, 28, 28)
    """

    dataset = SVHN
    classes = tuple("0123456789")
    default_augmentation = Augmentation(padding=2)  # a mirrored digit is another sign

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 64,
        mean: Sequence[float] = (0.4377, 0.4438, 0.4728),
        std: Sequence[float] = (0.1980, 0.2010, 0.1970),
        size: int | None = None,
        channels: Literal[1, 3] = 3,
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
        self.size = (size or 32, size or 32)

    def prepare_data(self) -> None:
        """Download the files unless they are there and complete."""
        for split in ("train", "test"):
            url, name, md5 = self.dataset.split_list[split]
            download(url, root=self.root, name=name, md5=md5)

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation split, and ``predict`` shows the test images."""
        if split == "val":
            return None
        images = self.dataset(self.root, split="train" if split == "train" else "test")
        pixels = torch.from_numpy(images.data).contiguous()
        return ImageSet(torch.from_numpy(images.labels), reshape(pixels, size=self.size, channels=len(self.mean)))
