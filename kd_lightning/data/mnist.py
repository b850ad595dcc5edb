"""MNIST, downloaded and checked by torchvision."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torchvision.datasets import MNIST

from kd_lightning.data.download import FAILURES
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.shapes import check_size, reshaped, statistics
from kd_lightning.errors import DownloadError, UserError


class MNISTDataModule(ImageDataModule):
    """MNIST: 60,000 training (6,000 of them for validation) and 10,000 test images of digits, 28x28, grey.

    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition, 1998

    Other digits in the same format are read as well where its four files are in ``root/MNIST/raw``.

    Args:
        root: Folder of ``MNIST/raw``; the files are downloaded (12 MB) if they are not there.
        batch_size: Images of a batch, of one process.
        val_fraction: Share of the training images of each class that is validated on.
        seed: Of the order of samples.
        view_seed: Of the augmentation.
        padding: Pixels on each side for the random crop.
        flip: Off by default: a mirrored digit is another sign.
        mean: Of the channel; the default is the one in wide use, as for ``std``.
        std: Standard deviation of the channel.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        num_workers: 0 is best: the images live on the device.
        views: V fixed views of each image in turn; ``None`` for a new one in each epoch.
        split_seed: Of the split; ``seed`` if ``None``.
        size: Height and width to which images are resized, once, when they are read; ``None`` for their own.
        channels: 3 for RGB, the grey channel repeated, as networks for colour images want it.

    Raises:
        ConnectionError: If the files can be neither found nor downloaded.
        ValueError: If an argument lies outside its range.
    """

    dataset = MNIST

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        view_seed: int = 0,
        padding: int = 2,
        flip: bool = False,
        mean: Sequence[float] = (0.1307,),
        std: Sequence[float] = (0.3081,),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_workers: int = 0,
        views: int | None = None,
        size: int | None = None,
        channels: Literal[1, 3] = 1,
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
        self.size = (size or 28, size or 28)
        self.channels = channels

    def prepare_data(self) -> None:
        """Download the files unless they are there and whole."""
        folder = Path(self.root, self.dataset.__name__, "raw")
        names = [name for name, _ in self.dataset.resources]
        for file in (folder / name.removesuffix(".gz") for name in names):
            if file.is_file() and not _is_whole(file):
                file.unlink()  # torchvision takes any file for a whole one
        try:
            self.dataset(self.root, download=True)
        except FAILURES as error:
            raise DownloadError(
                f"MNIST is not in {str(folder)!r} and cannot be downloaded ({' '.join(str(error).split())}); run "
                f"again, or get the files by other means and put {', '.join(names)} there."
            ) from error

    @property
    def classes(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation set of its own, and ``predict`` shows the test images."""
        if split == "val":
            return None
        images = self.dataset(self.root, train=split == "train")
        if len(images.data) != len(images.targets):
            raise UserError(
                f"{images.raw_folder!r} has {len(images.data)} images and {len(images.targets)} labels for {split!r}; "
                "take its files away to have them downloaded again."
            )
        return ImageSet(images.targets, reshaped(images.data[:, None], self.size, self.channels))


def _is_whole(file: Path) -> bool:
    """Whether an idx file is as long as its head says."""
    with file.open("rb") as opened:
        head = opened.read(16)
    dimensions = head[3] if len(head) > 3 else 0
    shape = [int.from_bytes(head[place : place + 4], "big") for place in range(4, 4 + 4 * dimensions, 4)]
    return file.stat().st_size == 4 + 4 * dimensions + math.prod(shape)
