"""One's own images in a folder for each class."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch

from kd_lightning.data.image_set import ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.images import SUFFIXES, open_image


class ImageFolderDataModule(ImageDataModule):
    """Images in ``train/<class>/``, and if they are there ``val/<class>/``, ``test/<class>/`` and ``predict/``.

    Every image becomes RGB. Without ``val/`` a share of each class of ``train/`` is validated on. ``predict/`` may hold
    images at any depth; without it, ``predict`` shows those of ``test/``. A set is decoded once and kept in memory
    (packed, four bytes a pixel) where it fits, else read batch by batch by ``num_workers`` processes.

    Args:
        root: The folder.
        image_size: Height and width to which images are resized; ``None`` where all have one size.
        batch_size: Images of a batch, of one process.
        val_fraction: Share of the training images of each class that is validated on.
        seed: Of the order of samples.
        view_seed: Of the augmentation.
        padding: Pixels on each side for the random crop.
        flip: Whether half of the training images are mirrored.
        mean: Of each channel; the default is ImageNet's, which published networks expect, as for ``std``.
        std: Standard deviation of each channel.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        num_workers: Processes that read a set which does not fit into memory.
        views: V fixed views of each image in turn; ``None`` for a new one in each epoch.
        split_seed: Of the split; ``seed`` if ``None``.
        memory_limit: GiB that a set may take in memory.

    Raises:
        FileNotFoundError: If a folder is not there.
        ValueError: If a class folder is empty, an image cannot be read or has another size, or the classes of two
            splits differ.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        view_seed: int = 0,
        padding: int = 4,
        flip: bool = True,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_workers: int = 0,
        views: int | None = None,
        memory_limit: float = 4.0,
        split_seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size, val_fraction, seed, view_seed, padding, flip, mean, std, mixup, cutmix, num_workers, views,
            split_seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self.root = Path(root)
        self.size = None if image_size is None else (image_size, image_size)
        self.memory_limit = memory_limit

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the folders in ``train/`` (else ``val/``, ``test/``), sorted."""
        split = next((s for s in ("train", "val", "test") if (self.root / s).is_dir()), None)
        if split is None:
            raise MissingFileError(
                f"{str(self.root)!r} has no folder train/, val/ or test/; put images into train/<class>/."
            )
        return _class_folders(self.root / split)

    def load(self, split: str) -> ImageSet | None:
        """List and check a split's files, and decode them if they fit into memory."""
        folder = self.root / split
        if split == "predict":
            if not folder.is_dir():
                return self._store("test")
            files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
            labels = torch.full((len(files),), -1)
        elif split == "val" and not folder.is_dir():
            return None
        else:
            files, labels = self._labelled(folder)
        if not files:
            raise UserError(f"{str(folder)!r} holds no images ({', '.join(sorted(SUFFIXES))}).")
        images = ImageSet(labels, None, files, self._size(files))
        return images.in_memory() if self._fits(images) else images

    def _labelled(self, folder: Path) -> tuple[list[Path], torch.Tensor]:
        if not folder.is_dir():
            raise MissingFileError(f"There is no folder {str(folder)!r}; put images into {folder.name}/<class>/.")
        if (found := _class_folders(folder)) != self.classes:
            differing = sorted(set(found) ^ set(self.classes))
            raise UserError(f"The class folders of {str(folder)!r} differ from the others: {', '.join(differing)}.")
        files, labels = [], []
        for label, name in enumerate(self.classes):
            members = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES)
            if not members:
                raise UserError(f"The class folder {str(folder / name)!r} holds no images; fill it or take it away.")
            files += members
            labels += [label] * len(members)
        return files, torch.tensor(labels)

    def _size(self, files: list[Path]) -> tuple[int, int]:
        with ThreadPoolExecutor() as pool:
            sizes = list(pool.map(_header_size, files))
        if self.size is not None:
            return self.size
        for file, size in zip(files, sizes, strict=True):
            if size != sizes[0]:
                raise UserError(
                    f"{str(file)!r} has {size[1]}x{size[0]} pixels and {str(files[0])!r} {sizes[0][1]}x{sizes[0][0]}; "
                    "set image_size to resize all images."
                )
        return sizes[0]

    def _fits(self, images: ImageSet) -> bool:
        assert images.size is not None
        height, width = (side + 2 * self.padding for side in images.size)
        return len(images.files) * height * width * 4 <= self.memory_limit * 2**30


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UserError(f"{str(folder)!r} has no class folders; put images into {folder.name}/<class>/.")
    return tuple(names)


def _header_size(file: Path) -> tuple[int, int]:
    with open_image(file) as image:
        return image.height, image.width
