"""Your own images, in a folder for each class."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.image_set import ImageFiles, ImageSet
from kd_lightning.data.module import ImageDataModule
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.images import SUFFIXES, open_image

_AUGMENTATION = Augmentation(padding=4, flip=True, mixup=0.0, cutmix=0.0)


class ImageFolderDataModule(ImageDataModule):
    """Images in ``train/<class>/``, and optionally in ``val/<class>/``, ``test/<class>/`` and ``predict/``.

    Every image becomes RGB. Without ``val/`` a fraction of each class of ``train/`` is validated on. ``predict/`` may
    hold images at any depth; without it, ``predict`` shows those of ``test/``. A set that fits into memory is decoded
    once and kept there (packed, four bytes a pixel), otherwise ``num_workers`` processes read it batch by batch.

    Args:
        root: The folder.
        image_size: Height and width to which images are resized; ``None`` if all have one size.
        augmentation: Random changes to training images; unset fields keep these defaults.
        mean: Mean of each channel; the default is ImageNet's, which published networks expect, as for ``std``.
        std: Standard deviation of each channel.
        memory_limit: GiB that a set may take in memory.
        **options: Arguments of :class:`ImageDataModule`.

    Raises:
        MissingFileError: If a folder does not exist.
        UserError: If a class folder is empty, an image cannot be read or has another size, or the classes of two
            splits differ.
    """

    def __init__(
        self,
        root: str = "data",
        *,
        image_size: int | None = None,
        augmentation: Augmentation = _AUGMENTATION,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        memory_limit: float = 4.0,
        **options: Any,
    ) -> None:
        augmentation = Augmentation.resolve(augmentation, _AUGMENTATION)
        super().__init__(augmentation=augmentation, mean=mean, std=std, **options)
        self.save_hyperparameters({"root": root, "image_size": image_size, "memory_limit": memory_limit})
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

    def load(self, split: str) -> ImageSet | ImageFiles | None:
        """List and check a split's files, and decode them if they fit into memory."""
        folder = self.root / split
        if split == "predict":
            if not folder.is_dir():
                return self.splits.read("test")
            files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
            labels = torch.full((len(files),), -1)
        elif split == "val" and not folder.is_dir():
            return None
        else:
            files, labels = self._labelled(folder)
        if not files:
            raise UserError(f"{str(folder)!r} holds no images ({', '.join(sorted(SUFFIXES))}).")
        images = ImageFiles(labels, files, self._size(files))
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
                raise UserError(f"The class folder {str(folder / name)!r} holds no images; fill or remove it.")
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

    def _fits(self, images: ImageFiles) -> bool:
        height, width = (side + 2 * self.augmenter.padding for side in images.size)
        return len(images.files) * height * width * 4 <= self.memory_limit * 2**30


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UserError(f"{str(folder)!r} has no class folders; put images into {folder.name}/<class>/.")
    return tuple(names)


def _header_size(file: Path) -> tuple[int, int]:
    with open_image(file) as image:
        return image.height, image.width
