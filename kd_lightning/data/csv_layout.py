"""Labels in a CSV file: which images belong to which split, and to which class."""

import csv
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.data.folder_layout import FolderLayout, Listing, check_several_classes
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.several_labels import BETWEEN, NO_CLASS
from kd_lightning.networks.data_config import truncate

_COLUMNS = ("file", "label", "split")
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Row:
    """A row of the file.

    Attributes:
        line: Its line, counted from 1.
        file: Path of the image.
        label: Name of its class, of several joined by ``;``, empty where unlabelled.
        split: ``"train"``, ``"val"`` or ``"test"``; empty if there is no such column.
    """

    line: int
    file: Path
    label: str
    split: str


class CsvLayout(FolderLayout):
    """Reads the images of each split, and their classes, from a CSV file with the columns ``file`` and ``label``.

    Files are named relative to the root. A column ``split`` says ``train``, ``val`` or ``test``; without it the images
    are one set. Images without a label are unlabelled training images, as those in ``unlabelled/``.

    Where images may have several classes, a label is their names joined by ``;`` (``cat;dog``), and ``-`` an image with
    none of the classes.

    Args:
        root: The folder of the images.
        file: The CSV file, relative to the root or to the working folder.
        multi_label: Whether images may have several classes; ``None`` if they do where a label contains ``;``.
    """

    def __init__(self, root: Path, file: str, multi_label: bool | None = None) -> None:
        super().__init__(root)
        self.given_multi_label = multi_label
        self.file = root / file if (root / file).is_file() else Path(file).expanduser()

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the file, checked.

        Raises:
            MissingFileError: If the file or an image does not exist.
            UserError: If columns are missing or unknown, an image is named twice, or a split is not known.
        """
        if not self.root.is_dir():
            raise MissingFileError(f"There is no folder {str(self.root)!r}; set root to the folder of your images.")
        if not self.file.is_file():
            raise MissingFileError(f"There is no file {str(self.file)!r} of labels; check its name.")
        rows = self._read()
        self._check_names(rows)
        self._check_files(rows)
        self._check_twice(rows)
        return rows

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, sorted.

        Raises:
            UserError: If there is only one, or a class of another split has no training images.
        """
        names = {name for row in self.rows if row.split in ("", "train") for name in self._classes_of(row)}
        for row in self.rows:
            for name in self._classes_of(row):
                if name not in names:
                    raise UserError(
                        f"{self._place(row)} has the class {name!r} in {row.split!r}, which no row of 'train' has; "
                        "add training images of it, or correct the label."
                    )
        if self.multi_label and not names:
            raise UserError(
                f"{str(self.file)!r} names no class of a training image, from which the classes are read; label some."
            )
        classes = tuple(sorted(names))
        check_several_classes(classes, str(self.file))
        return classes

    @cached_property
    def multi_label(self) -> bool:
        """Return whether images may have several classes: as declared, or else whether a label contains ``;``."""
        return self._several(self.rows)

    def _several(self, rows: list[Row]) -> bool:
        given = self.given_multi_label
        return any(BETWEEN in row.label for row in rows) if given is None else given

    def _classes_of(self, row: Row) -> list[str]:
        """Return the names of a row's classes."""
        if not self.multi_label:
            return [row.label] if row.label else []
        return [] if row.label in ("", NO_CLASS) else _names(row.label)

    @cached_property
    def has_one_set(self) -> bool:
        """Return whether the file does not divide the images into splits."""
        return not any(row.split for row in self.rows)

    @property
    def one_set(self) -> str:
        """Words for a set that is not divided, for a message."""
        return f"{str(self.file)!r} has no column 'split' ({len(self.classes)} classes: {truncate(self.classes)})"

    def advice(self, split: str) -> str:
        """Return how a user divides the images, as an imperative."""
        return f"add a column 'split' with train and {split} to {str(self.file)!r}"

    def has_split(self, split: str) -> bool:
        """Return whether there are images of a split."""
        return any(row.split == split for row in self.rows)

    def training_images(self) -> Listing:
        """Return the labelled training images."""
        return self._listing(row for row in self.rows if row.label and row.split in ("", "train"))

    def unlabelled_images(self) -> Listing:
        """Return the training images without a label, and those in ``unlabelled/``."""
        files = [row.file for row in self.rows if not row.label]
        beside = super().unlabelled_images()
        labels = self._labels([[] for _ in files + beside.files])
        return Listing(files + beside.files, torch.full_like(labels, -1))

    def images_of(self, split: str) -> Listing:
        """Return the images of a split.

        Raises:
            UserError: If there are none.
        """
        listing = self._listing(row for row in self.rows if row.split == split)
        if not listing.files:
            raise UserError(f"{str(self.file)!r} has no row of the split {split!r}; add some.")
        if self.multi_label and not bool((listing.labels > 0).any()):
            raise UserError(
                f"No image of the split {split!r} in {str(self.file)!r} has a class, so there is nothing to measure; "
                "add some that have one."
            )
        return listing

    def _listing(self, rows: object) -> Listing:
        chosen: list[Row] = list(rows)  # type: ignore[call-overload]
        return Listing([row.file for row in chosen], self._labels([self._classes_of(row) for row in chosen]))

    def _labels(self, names: list[list[str]]) -> Tensor:
        """Return the labels of images that have classes of these names."""
        places = {name: label for label, name in enumerate(self.classes)}
        if not self.multi_label:
            return torch.tensor([places[mine[0]] if mine else -1 for mine in names], dtype=torch.int64)
        labels = torch.zeros(len(names), len(places))
        for row, mine in enumerate(names):
            labels[row, [places[name] for name in mine]] = 1
        return labels

    def _read(self) -> list[Row]:
        try:
            with self.file.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, skipinitialspace=True)
                names = [name.strip() for name in reader.fieldnames or []]
                self._check_columns(names)
                reader.fieldnames = names
                return [self._row(reader.line_num, values) for values in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{str(self.file)!r} is not a CSV file in UTF-8 ({error}); save it as one.") from error

    def _check_columns(self, names: list[str]) -> None:
        missing = [name for name in _COLUMNS[:2] if name not in names]
        if missing:
            raise UserError(
                f"{str(self.file)!r} has no column {missing[0]!r} but {truncate([repr(name) for name in names])}; its "
                "first line must name the columns, separated by commas: file,label."
            )
        if unknown := [name for name in names if name not in _COLUMNS]:
            raise UserError(
                f"{str(self.file)!r} has the column {unknown[0]!r}, which is not read; columns are file, label and "
                "split (train, val or test): rename or remove it."
            )

    def _row(self, line: int, values: dict[str, str]) -> Row:
        texts = {name: (values.get(name) or "").strip() for name in _COLUMNS}
        row = Row(line, self.root / texts["file"], texts["label"], texts["split"])
        if not texts["file"] or None in values:
            raise UserError(f"{self._place(row)} does not have one value for each column; correct it.")
        if "split" in values and row.split not in _SPLITS:
            raise UserError(f"{self._place(row)} has the split {row.split!r}; it must be {', '.join(_SPLITS)}.")
        if not row.label and row.split not in ("", "train"):
            raise UserError(f"{self._place(row)} has no label; images of {row.split!r} need one.")
        return row

    def _check_names(self, rows: list[Row]) -> None:
        """Check the names in labels of several classes, or that there are none."""
        several = self._several(rows)
        for row in rows:
            if BETWEEN not in row.label:
                continue
            if not several:
                raise UserError(
                    f"{self._place(row)} names several classes, {row.label!r}, but multi_label is false; set it to "
                    "true or null, or correct the label."
                )
            names = _names(row.label)
            problem = next((name for name in names if name in ("", NO_CLASS) or names.count(name) > 1), None)
            if problem is not None:
                what = f"{problem!r} twice" if problem not in ("", NO_CLASS) else f"{problem!r} among several classes"
                raise UserError(f"{self._place(row)} names {what}, {row.label!r}; correct it.")

    def _check_files(self, rows: list[Row]) -> None:
        missing = [row for row in rows if not row.file.is_file()]
        if missing:
            raise MissingFileError(
                f"{str(self.file)!r} names {len(missing)} of {len(rows)} files that do not exist: "
                f"{truncate([str(row.file) for row in missing])}; correct them, or set root to their folder."
            )

    def _check_twice(self, rows: list[Row]) -> None:
        counts = Counter(row.file for row in rows)
        twice = next((row for row in rows if counts[row.file] > 1), None)
        if twice is not None:
            labels = sorted({row.label for row in rows if row.file == twice.file})
            words = f"in two classes, {labels[0]!r} and {labels[1]!r}" if len(labels) > 1 else "named twice"
            both = f", or write '{labels[0]};{labels[1]}' in one if it has both" if len(labels) > 1 else ""
            raise UserError(f"{str(twice.file)!r} is {words} in {str(self.file)!r}; keep one of its rows{both}.")

    def _place(self, row: Row) -> str:
        return f"Line {row.line} of {str(self.file)!r}"


def _names(label: str) -> list[str]:
    return [name.strip() for name in label.split(BETWEEN)]
