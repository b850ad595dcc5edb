"""Layouts of a user's folder: which images belong to which split, and to which class."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.digest import sha256
from kd_lightning.files.find_images import describe_left_out, describe_suffixes, find_images, is_hidden
from kd_lightning.networks.data_config import truncate

_LABELLED = ("train", "val", "test")
_UNLABELLED = ("unlabelled", "unlabeled")
_RESERVED = (*_LABELLED, "predict", *_UNLABELLED, "lightning_logs")  # where Lightning writes by default
_OTHER_NAMES = {name: name for name in _RESERVED} | {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}
"""What others call the folders of splits, which would be taken for classes or not be read."""


class Listing(NamedTuple):
    """The files of a split.

    Attributes:
        files: Image files.
        labels: int64 ``(N,)``, -1 where unlabelled; where images may have several classes floats ``(N, C)``, 1 for
            each of them and 0 for the others, with rows of -1 where unlabelled.
    """

    files: list[Path]
    labels: Tensor


def check_several_classes(classes: tuple[str, ...], place: str) -> None:
    """Make sure that there is not only one class.

    Raises:
        UserError: If there is.
    """
    if len(classes) == 1:
        raise UserError(
            f"{place!r} has one class only, {classes[0]!r}, and there is nothing to learn from one; add another class, "
            "or, if the images are unlabelled, put them into unlabelled/."
        )


class FolderLayout:
    """Finds the images of each split, and their classes, in a folder.

    ``train/``, ``val/`` and ``test/`` have a folder for each class, in which images are found at any depth. If there is
    none of the three, the folders in the root are the classes. Training images without labels are in ``unlabelled/``,
    or directly in ``train/`` (or the root) where that has no folders. Files that are not read are counted in a warning.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def multi_label(self) -> bool:
        """Return ``False``, since an image lies in the folder of one class."""
        return False

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the class folders, sorted; empty if nothing is labelled.

        Raises:
            UserError: If folders in the root may be splits or classes.
        """
        labelled = (self.root / name for name in _LABELLED)
        for folder in (self.training_folder, *labelled):
            if folder.is_dir() and (names := self._class_folders(folder)):
                check_several_classes(names, str(folder))
                return names
        return ()

    @cached_property
    def training_folder(self) -> Path:
        """The folder of the class folders, or of unlabelled images, for training."""
        return self.root if self.has_one_set else self.root / "train"

    @cached_property
    def has_one_set(self) -> bool:
        """Return whether the folders in the root are the classes, rather than splits.

        Raises:
            MissingFileError: If there is no such folder.
            UserError: If folders in the root may be splits or classes.
        """
        if not self.root.is_dir():
            raise MissingFileError(f"There is no folder {str(self.root)!r}; set root to the folder of your images.")
        if any((self.root / name).is_dir() for name in _LABELLED):
            self._warn_about_other_names()
            return False
        names = self._class_folders(self.root)
        for name in names:
            if (split := _OTHER_NAMES.get(name.casefold())) is not None:
                raise UserError(
                    f"{str(self.root)!r} has no folder train/, but {name!r}; rename that to {split!r}, or, if it is a "
                    "class, put the class folders into train/."
                )
        if len(names) == 1:
            raise UserError(
                f"{str(self.root)!r} has no folder train/, and only the folder {names[0]!r}, which is not two classes; "
                "if it holds the images, set root to it, otherwise put the class folders into train/."
            )
        return bool(names) or bool(self._images_in(self.root, recursive=False, warn=False))

    @property
    def one_set(self) -> str:
        """Words for a set that is not divided, for a message."""
        names = self.classes
        return f"{str(self.root)!r} has no train/, so its {len(names)} folders are the classes ({truncate(names)})"

    def advice(self, split: str) -> str:
        """Return how a user divides the images, as an imperative."""
        return f"put them into train/<class>/ and {split}/<class>/"

    def has_split(self, split: str) -> bool:
        """Return whether there is a folder for a split."""
        return (self.root / split).is_dir()

    def images_of(self, split: str) -> Listing:
        """Return the images of a split, as :meth:`labelled_images`."""
        return self.labelled_images(self.root / split)

    def training_images(self) -> Listing:
        """Return the images of the training folder, without those of ``unlabelled/``.

        Raises:
            MissingFileError: If there is no such folder.
            UserError: If it holds no images, or it is not clear what is a class.
        """
        folder, unlabelled = self.training_folder, any((self.root / name).is_dir() for name in _UNLABELLED)
        if not folder.is_dir():
            if unlabelled:
                return _listing([])
            raise MissingFileError(f"There is no folder {str(folder)!r}; put images into train/<class>/.")
        if self._class_folders(folder):
            return self.labelled_images(folder)
        files = self._images_in(folder, recursive=False)
        if not files and not unlabelled:
            raise UserError(f"{str(folder)!r} has no class folders; put images into {folder.name}/<class>/.")
        others = [name for name in self._folders(self.root) if name not in _RESERVED] if folder != self.root else []
        if files and (others := [name for name in others if find_images(self.root / name).files]):
            raise UserError(
                f"{str(folder)!r} holds images and no class folders, beside {truncate(others)}; if all of these are "
                "classes, put them into train/, and if the images are unlabelled, into unlabelled/."
            )
        return _listing(files)

    def unlabelled_images(self) -> Listing:
        """Return the images in ``unlabelled/``, at any depth."""
        folders = (self.root / name for name in _UNLABELLED)
        return _listing([file for folder in folders if folder.is_dir() for file in self._images_in(folder)])

    def labelled_images(self, folder: Path) -> Listing:
        """Return the images in the class folders of a folder.

        Raises:
            MissingFileError: If there is no such folder.
            UserError: If its classes differ from :attr:`classes`, or a class has no images.
        """
        if not folder.is_dir():
            raise MissingFileError(f"There is no folder {str(folder)!r}; put images into {folder.name}/<class>/.")
        found = self._class_folders(folder)
        if not found:
            raise UserError(f"{str(folder)!r} has no class folders; put images into {folder.name}/<class>/.")
        if found != self.classes:
            differing = sorted(set(found) ^ set(self.classes))
            raise UserError(f"The class folders of {str(folder)!r} differ from the others: {', '.join(differing)}.")
        files: list[Path] = []
        labels: list[int] = []
        left_out: Counter[str] = Counter()
        for label, name in enumerate(found):
            members = find_images(folder / name)
            if not members.files:
                seen = f" that Pillow reads ({describe_suffixes(members.left_out)})" if members.left_out else ""
                raise UserError(f"The class folder {str(folder / name)!r} holds no images{seen}; fill or remove it.")
            files += members.files
            labels += [label] * len(members.files)
            left_out += members.left_out
        self._warn(folder, left_out)
        _check_in_one_class(files, labels, found)
        if loose := self._images_in(folder, recursive=False, warn=False):
            rank_zero_warn(
                f"Images directly in {str(folder)!r} are left out, since they are in no class folder: "
                f"{truncate([file.name for file in loose])}; unlabelled images belong in unlabelled/."
            )
        return _listing(files, labels)

    def other_images(self, folder: Path) -> Listing:
        """Return the images in a folder, at any depth, as unlabelled."""
        return _listing(self._images_in(folder))

    def _warn_about_other_names(self) -> None:
        for name in self._folders(self.root):
            split = _OTHER_NAMES.get(name.casefold(), name)
            if split != name and not (self.root / split).is_dir():
                rank_zero_warn(f"The folder {str(self.root / name)!r} is not read; if it is {split!r}, rename it.")

    def _class_folders(self, folder: Path) -> tuple[str, ...]:
        names = self._folders(folder)
        return tuple(name for name in names if name not in _RESERVED) if folder == self.root else names

    def _folders(self, folder: Path) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)))

    def _images_in(self, folder: Path, *, recursive: bool = True, warn: bool = True) -> list[Path]:
        found = find_images(folder, recursive=recursive)
        if warn:
            self._warn(folder, found.left_out)
        return found.files

    def _warn(self, folder: Path, left_out: Counter[str]) -> None:
        if left_out:
            rank_zero_warn(describe_left_out(folder, left_out))


def _check_in_one_class(files: list[Path], labels: list[int], classes: tuple[str, ...]) -> None:
    """Make sure that no file lies in two classes: of one name, one size and one content."""
    alike: dict[tuple[str, int], list[int]] = {}
    for number, file in enumerate(files):
        alike.setdefault((file.name, file.stat().st_size), []).append(number)
    for numbers in alike.values():
        if len({labels[number] for number in numbers}) < 2:
            continue
        seen: dict[str, int] = {}
        for number in numbers:
            first = seen.setdefault(sha256(files[number]), number)
            if labels[first] != labels[number]:
                raise UserError(
                    f"{str(files[number])!r} is in two classes, since it is the same file as {str(files[first])!r}; "
                    f"remove it from {classes[labels[first]]!r} or {classes[labels[number]]!r}."
                )


def _listing(files: list[Path], labels: list[int] | None = None) -> Listing:
    return Listing(files, torch.tensor([-1] * len(files) if labels is None else labels, dtype=torch.int64))
