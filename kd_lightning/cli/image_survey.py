"""Looks at images in class folders or a CSV file: classes, counts, sizes, and obstacles to training on them."""

import shlex
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from kd_lightning.data.csv_layout import CsvLayout
from kd_lightning.data.folder_layout import FolderLayout
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.find_images import find_images
from kd_lightning.files.images import UnreadableImageError, shown_size
from kd_lightning.files.progress import progress
from kd_lightning.networks.data_config import truncate

_MOST_READ = 20_000
"""Images whose headers are read; of more, as many that are evenly spaced."""
_UNBALANCED = 3.0
"""Factor between the largest and the smallest class from which imbalance is pointed out."""


@dataclass(frozen=True)
class Survey:
    """The images of a folder.

    Attributes:
        classes: Names of the classes.
        counts: Number of images in ``train``, and in ``val``, ``test`` and ``unlabelled`` where there are such images.
        by_class: Number of training images of each class, the largest first.
        sizes: Height and width of the images that were read.
        classes_of_images: Number of classes of each training image, where it may have several; else empty.
        problems: Sentences about images that cannot be read, and files that are left out, without a full stop.
    """

    classes: tuple[str, ...]
    counts: dict[str, int]
    by_class: list[tuple[str, int]]
    sizes: list[tuple[int, int]]
    classes_of_images: list[int]
    problems: list[str]

    @property
    def is_split(self) -> bool:
        """Return whether it is said which images to validate on."""
        return "val" in self.counts

    @property
    def median_side(self) -> int:
        """Return the median of the shorter sides, in pixels."""
        return int(median(min(size) for size in self.sizes))

    @property
    def lines(self) -> list[str]:
        """Return sentences about the images, without a full stop."""
        counts = ", ".join(f"{split} {count:,}" for split, count in self.counts.items())
        return [
            f"Images: {counts}, in {len(self.classes)} classes",
            f"Images of each class: {_listed(self.by_class)}",
            self._balance(),
            *self._several(),
            f"Pixels (width x height): {self._extent()}",
            *self.problems,
        ]

    def _balance(self) -> str:
        (largest, most), (smallest, fewest) = self.by_class[0], self.by_class[-1]
        advice = "; look at the accuracy of each class too" if most > _UNBALANCED * fewest else ""
        return (
            f"The largest class, {largest}, has {most / fewest:.1f} times as many as the smallest, {smallest}{advice}"
        )

    def _several(self) -> list[str]:
        if not self.classes_of_images:
            return []
        mean, none = sum(self.classes_of_images) / len(self.classes_of_images), self.classes_of_images.count(0)
        return [f"An image may have several classes; it has {mean:.1f} on average, and {none:,} have none"]

    def _extent(self) -> str:
        heights, widths = zip(*self.sizes, strict=True)
        if len(set(self.sizes)) == 1:
            return f"{widths[0]}x{heights[0]} each"
        return (
            f"{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}; half of them have a shorter side of at "
            f"least {self.median_side}"
        )


def survey(folder: Path, labels: str | None = None) -> Survey:
    """Look at a folder of images.

    Args:
        folder: The folder.
        labels: CSV file of labels, relative to the folder or to the working folder, in place of class folders.

    Raises:
        MissingFileError: If there is no such folder or file.
        UserError: If it is not clear what the classes are.
    """
    if labels is None:
        _check(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _survey(FolderLayout(folder) if labels is None else CsvLayout(folder, labels))
    notes = [str(note.message).rstrip(".") for note in caught if issubclass(note.category, UserWarning)]
    return replace(found, problems=[*found.problems, *dict.fromkeys(notes)])


def _survey(layout: FolderLayout) -> Survey:
    training = layout.training_images()
    _check_classes(layout)
    counts, files = {"train": len(training.files)}, list(training.files)
    for split in ("val", "test"):
        if layout.has_split(split) and not layout.has_one_set:
            members = layout.images_of(split).files
            counts[split] = len(members)
            files += members
    if unlabelled := layout.unlabelled_images().files:
        counts["unlabelled"] = len(unlabelled)
    several = (training.labels > 0).sum(1).tolist() if layout.multi_label else []
    labels = training.labels.nonzero()[:, 1] if layout.multi_label else training.labels
    by_class = Counter(layout.classes[label] for label in labels.tolist()).most_common()
    sizes, unreadable = _read_sizes(files)
    many = "s" * (len(unreadable) > 1)
    problems = [f"{len(unreadable)} image{many} cannot be read, as {unreadable[0]}"] if unreadable else []
    return Survey(layout.classes, counts, by_class, sizes, several, problems)


def _check(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{str(folder)!r} is a file; name the folder that holds a folder of images for each class.")
    if not folder.is_dir():
        raise MissingFileError(f"There is no folder {str(folder)!r}; name the folder of your images.")
    if not find_images(folder).files:
        raise UserError(f"{str(folder)!r} holds no images; put those of each class into {folder}/<class>/.")


def _check_classes(layout: FolderLayout) -> None:
    """Refuse a folder without classes, and folders of folders of folders: it is not clear which are the classes."""
    folder, classes = layout.root, layout.classes
    if isinstance(layout, CsvLayout):
        if not classes:
            raise UserError(f"{str(layout.file)!r} gives no training image a label; label some.")
        return
    if not classes:
        tables = sorted(file.name for file in folder.glob("*.csv"))
        use = f"; if {tables[0]} has the columns file,label, add --labels {shlex.quote(tables[0])}" if tables else ""
        raise UserError(
            f"{str(folder)!r} holds images and no class folders; put the images of each class into {folder}/<class>/"
            f"{use}."
        )
    if layout.has_one_set and not any(find_images(folder / name, recursive=False).files for name in classes):
        inner = sorted(path.name for path in (folder / classes[0]).iterdir() if path.is_dir())
        raise UserError(
            f"The folders in {str(folder)!r} ({truncate(classes)}) hold no images but further folders "
            f"({truncate(inner)}); name the folder right above the class folders, or put the images of each class "
            f"into {folder}/<class>/."
        )


def _read_sizes(files: list[Path]) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the sizes of images as viewers show them, and sentences about those that cannot be read."""
    read = files[:: -(-len(files) // _MOST_READ)]
    sizes: list[tuple[int, int]] = []
    unreadable: list[str] = []
    with ThreadPoolExecutor() as pool, progress("Reading sizes", len(read)) as advance:
        for found in pool.map(_size_or_error, read):
            sizes.append(found) if isinstance(found, tuple) else unreadable.append(str(found).rstrip("."))
            advance(1)
    if not sizes:
        raise UserError(f"None of the {len(read)} images can be read, as {unreadable[0]}.")
    return sizes, unreadable


def _size_or_error(file: Path) -> tuple[int, int] | UnreadableImageError:
    try:
        return shown_size(file)
    except UnreadableImageError as error:
        return error


def _listed(counts: list[tuple[str, int]]) -> str:
    """Return the classes with their numbers of images; of many the largest and the smallest.

    Example:
        >>> _listed([("cat", 1200), ("dog", 30)])
        'cat 1,200, dog 30'
    """
    texts = [f"{name} {count:,}" for name, count in counts]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:6], "...", *texts[-6:]])
