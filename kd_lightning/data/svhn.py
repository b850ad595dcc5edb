"""SVHN, downloaded and checked by torchvision."""

from collections.abc import Sequence
from typing import Literal

import torch
from torchvision.datasets import SVHN

from kd_lightning.data.download import download
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.shapes import check_size, reshaped, statistics


class SVHNDataModule(ImageDataModule):
    """SVHN: 73,257 training (a tenth of them for validation) and 26,032 test images of house numbers' digits, 32x32.

    Y. Netzer et al.: Reading Digits in Natural Images with Unsupervised Feature Learning, 2011,
    http://ufldl.stanford.edu/housenumbers

    Args:
        root: Folder of the two files; they are downloaded (246 MB) if they are not there, and their MD5 checked.
        batch_size: See :class:`MNISTDataModule`, as for all other arguments.
        val_fraction: See there.
        seed: See there.
        view_seed: See there.
        padding: See there.
        flip: See there.
        mean: See there; of grey images it is computed from that of the three channels, as ``std`` is.
        std: See ``mean``.
        mixup: See there.
        cutmix: See there.
        num_workers: See there.
        views: See there.
        split_seed: See there.
        size: See there.
        channels: 1 for grey.

    Raises:
        ConnectionError: If the files can be neither found nor downloaded.
        ValueError: If an argument lies outside its range.
    """

    dataset = SVHN

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        view_seed: int = 0,
        padding: int = 2,
        flip: bool = False,
        mean: Sequence[float] = (0.4377, 0.4438, 0.4728),
        std: Sequence[float] = (0.1980, 0.2010, 0.1970),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_workers: int = 0,
        views: int | None = None,
        size: int | None = None,
        channels: Literal[1, 3] = 3,
        split_seed: int | None = None,
    ) -> None:
        mean_std = statistics(mean, channels), statistics(std, channels)
        super().__init__(
            batch_size, val_fraction, seed, view_seed, padding, flip, *mean_std, mixup, cutmix, num_workers, views,
            split_seed,
        )  # fmt: skip
        check_size(size)
        self.save_hyperparameters()
        self.root = root
        self.size = (size or 32, size or 32)
        self.channels = channels

    def prepare_data(self) -> None:
        """Download the files unless they are there and whole."""
        for split in ("train", "test"):
            url, name, md5 = self.dataset.split_list[split]
            download(url, self.root, name, md5)

    @property
    def classes(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation set of its own, and ``predict`` shows the test images."""
        if split == "val":
            return None
        images = self.dataset(self.root, split="train" if split == "train" else "test")
        pixels = torch.from_numpy(images.data).contiguous()
        return ImageSet(torch.from_numpy(images.labels), reshaped(pixels, self.size, self.channels))
