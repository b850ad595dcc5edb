"""Handwritten digits that come with scikit-learn."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.errors import UserError


class DigitsDataModule(ImageDataModule):
    """1,797 real handwritten digits, 8x8, one channel, 10 classes; nothing is downloaded.

    E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998

    360 images, the same for every seed, are the test set.

    Args:
        batch_size: Images in a batch of one process.
        val_fraction: Fraction of each class that is split from the training images.
        mean: Mean of the channel.
        std: Standard deviation of the channel.
        margin: Black pixels that are added on each side when images are read: these digits fill their 8x8 pixels, while
            other data sets leave a margin.
        **options: Arguments of :class:`ImageDataModule`.

    Raises:
        UserError: If an argument is outside its range.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.augment(next(iter(data.train_dataloader()))).images.shape
        torch.Size([32, 1, 8, 8])
    """

    classes = tuple("0123456789")
    default_augmentation = Augmentation(padding=1)  # a mirrored digit is another sign

    def __init__(
        self,
        *,
        batch_size: int = 64,
        val_fraction: float = 0.2,
        mean: Sequence[float] = (0.305,),
        std: Sequence[float] = (0.376,),
        margin: int = 0,
        **options: Any,
    ) -> None:
        if margin < 0:
            raise UserError(f"margin must be >= 0, got {margin}.")
        super().__init__(
            batch_size=batch_size,
            val_fraction=val_fraction,
            mean=mean,
            std=std,
            **options,
        )
        self.save_hyperparameters({"margin": margin})
        self.margin = margin

    def load(self, split: str) -> ImageSet | None:
        """Read a split; there is no validation split, and ``predict`` shows the test images."""
        if split == "val":
            return None
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(range(len(digits.target)), test_size=360, random_state=0, stratify=digits.target)
        chosen = sorted(train if split == "train" else test)
        pixels = torch.from_numpy(digits.images[chosen] * 255 / 16).round().to(torch.uint8)[:, None]
        return ImageSet(torch.from_numpy(digits.target[chosen]).long(), F.pad(pixels, [self.margin] * 4))
