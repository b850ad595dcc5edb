"""Handwritten digits that come with scikit-learn."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.errors import UserError


class DigitsDataModule(ImageDataModule):
    """1,797 real handwritten digits, 8x8, one channel, 10 classes; nothing is downloaded.

    E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998

    360 images, the same for every seed, are the test set.

    Args:
        batch_size: Images of a batch, of one process.
        val_fraction: Share of the training images of each class that is validated on.
        seed: Of the order of samples.
        view_seed: Of the augmentation.
        padding: Pixels on each side for the random crop.
        flip: Off by default: a mirrored digit is another sign.
        mean: Of the channel.
        std: Standard deviation of the channel.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        num_workers: 0 is best: the images live on the device.
        views: V fixed views of each image in turn; ``None`` for a new one in each epoch.
        split_seed: Of the split; ``seed`` if ``None``.
        margin: Black pixels that are added on each side when images are read: the digits fill their 8x8 pixels, where
            other sets leave a margin.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> images, labels, ids = data.view(next(iter(data.train_dataloader())))
        >>> images.shape
        torch.Size([32, 1, 8, 8])
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.2,
        seed: int = 0,
        view_seed: int = 0,
        padding: int = 1,
        flip: bool = False,
        mean: Sequence[float] = (0.305,),
        std: Sequence[float] = (0.376,),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_workers: int = 0,
        views: int | None = None,
        margin: int = 0,
        split_seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size, val_fraction, seed, view_seed, padding, flip, mean, std, mixup, cutmix, num_workers, views,
            split_seed,
        )  # fmt: skip
        if margin < 0:
            raise UserError(f"margin must be >= 0, got {margin}.")
        self.save_hyperparameters()
        self.margin = margin

    @property
    def classes(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation set of its own, and ``predict`` shows the test images."""
        if split == "val":
            return None
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(range(len(digits.target)), test_size=360, random_state=0, stratify=digits.target)
        chosen = sorted(train if split == "train" else test)
        pixels = torch.from_numpy(digits.images[chosen] * 255 / 16).round().to(torch.uint8)[:, None]
        pixels = F.pad(pixels, [self.margin] * 4)
        return ImageSet(torch.from_numpy(digits.target[chosen]).long(), pixels)
