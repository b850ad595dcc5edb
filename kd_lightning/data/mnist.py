"""MNIST, downloaded and checked by torchvision."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torchvision.datasets import MNIST

from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.download import FAILURES
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.shapes import check_size, reshape, statistics
from kd_lightning.errors import DownloadError, UserError


class MNISTDataModule(ImageDataModule):
    """MNIST: 60,000 training (6,000 of them for validation) and 10,000 test images of digits, 28x28, grey.

    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition, 1998

    Other digits in the same format are read as well if their four files are in ``root/MNIST/raw``.

    Args:
        root: Folder of ``MNIST/raw``; the files are downloaded (12 MB) if they are missing.
        batch_size: Images in a batch of one process.
        mean: Mean of the channel; the default is the one in wide use, as for ``std``.
        std: Standard deviation of the channel.
        size: Height and width to which images are resized, once, when they are read; ``None`` for their own.
        channels: 3 for RGB, the grey channel repeated, for networks that take colour images.
        **options: Arguments of :class:`ImageDataModule`.

    Raises:
        DownloadError: If the files can be neither found nor downloaded.
        UserError: If an argument is outside its range.

    Example:
        >>> MNISTDataModule("data", size=32, channels=3).image_shape  # for networks that take colour images
        (3, 32, 32)
    """

    dataset = MNIST
    classes = tuple("0123456789")
    default_augmentation = Augmentation(padding=2)  # a mirrored digit is another sign

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 64,
        mean: Sequence[float] = (0.1307,),
        std: Sequence[float] = (0.3081,),
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
        self.size = (size or 28, size or 28)

    def prepare_data(self) -> None:
        """Download the files unless they are there and complete."""
        folder = Path(self.root, self.dataset.__name__, "raw")
        names = [name for name, _ in self.dataset.resources]
        for file in (folder / name.removesuffix(".gz") for name in names):
            if file.is_file() and not is_complete(file):
                file.unlink()  # torchvision checks only that the file exists
        try:
            self.dataset(self.root, download=True)
        except FAILURES as error:
            raise DownloadError(
                f"MNIST is not in {str(folder)!r} and cannot be downloaded ({' '.join(str(error).split())}); run "
                f"again, or get the files by other means and put {', '.join(names)} there."
            ) from error

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation split, and ``predict`` shows the test images."""
        if split == "val":
            return None
        images = self.dataset(self.root, train=split == "train")
        if len(images.data) != len(images.targets):
            raise UserError(
                f"{images.raw_folder!r} has {len(images.data)} images and {len(images.targets)} labels for {split!r}; "
                "remove its files to have them downloaded again."
            )
        return ImageSet(images.targets, reshape(images.data[:, None], size=self.size, channels=len(self.mean)))


def is_complete(file: Path) -> bool:
    """Return whether an idx file has the length that its header declares."""
    with file.open("rb") as opened:
        head = opened.read(16)
    dimensions = head[3] if len(head) > 3 else 0
    shape = [int.from_bytes(head[start : start + 4], "big") for start in range(4, 4 + 4 * dimensions, 4)]
    return file.stat().st_size == 4 + 4 * dimensions + math.prod(shape)
