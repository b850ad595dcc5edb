"""Your own images, in a folder for each class."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from kd_lightning.data.csv_layout import CsvLayout
from kd_lightning.data.folder_layout import FolderLayout, Listing
from kd_lightning.data.image_form import ImageForm
from kd_lightning.data.image_set import ImageFiles, ImageSet, StreamedImages
from kd_lightning.data.partition import Partition, draw_partition, restore_partition, save_partition
from kd_lightning.data.photographs import PhotographDataModule, SizesDifferError
from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError, describe_unreadable, shown_size, unreadable
from kd_lightning.files.progress import progress

Header = tuple[int, int] | UnreadableImageError
"""Height and width of an image, or why it cannot be read."""
_TEST_FRACTION = 0.1


class ImageFolderDataModule(PhotographDataModule):
    """Images in ``train/<class>/``, and optionally in ``val/<class>/``, ``test/<class>/`` and ``predict/``.

    Images are found at any depth of a class folder. Without ``val/`` a fraction of each class of ``train/`` is
    validated on. If there is no ``train/``, ``val/`` or ``test/``, the folders in the root are the classes:
    ``val_fraction`` of each is validated on and a tenth tested on, chosen by ``split_seed`` and kept in checkpoints.
    ``predict/`` may hold images at any depth; without it, ``predict`` shows those of the test, or of a root without
    folders.

    Training images without labels (label -1, from which a student or a target domain learns) are in ``unlabelled/``
    at any depth, or directly in ``train/`` (or in the root) where that has no folders.

    An image is read as a viewer shows it: turned as its EXIF orientation says, its transparent parts white, of an
    animation the first frame. With one mean and deviation it becomes grey (luma), with three RGB. All formats that the
    installed Pillow reads are used (HEIC with ``pillow-heif``); other files are counted in a warning, hidden ones are
    ignored. ``predict`` leaves out images that cannot be read, and names them; the command then exits with 1.

    Args:
        root: The folder.
        labels: A CSV file with the columns ``file,label``, relative to the root or to the working folder, in place of
            class folders; ``file`` is relative to the root, an empty ``label`` means unlabelled. A third column
            ``split`` (``train``, ``val``, ``test``) divides the images; without it they are divided as above. If an
            image has several classes, a label is their names joined by ``;``, and ``-`` means none of the classes.
        multi_label: Whether images may have several classes, which then are learned one by one (sigmoid); ``None`` if
            they do where a label in the file contains ``;``.
        **options: Arguments of :class:`PhotographDataModule` and :class:`ImageDataModule`.

    Raises:
        MissingFileError: If a folder does not exist.
        UserError: If a class folder is empty, images cannot be read or have another size, or the classes of two
            splits differ.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cats", "dogs"):
        ...         for number in range(20):
        ...             file = Path(folder, "train", name, f"{number}.png")
        ...             file.parent.mkdir(parents=True, exist_ok=True)
        ...             Image.new("RGB", (60, 40), (number, 0, len(name) * (name == "dogs"))).save(file)
        ...     data = ImageFolderDataModule(folder, image_size=32, batch_size=4)
        ...     data.setup("fit")
        ...     batch = next(iter(data.train_dataloader()))
        ...     data.classes, batch.pixels.shape
        (('cats', 'dogs'), torch.Size([4, 3, 32, 32]))
    """

    def __init__(
        self,
        root: str = "data",
        *,
        labels: str | None = None,
        multi_label: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.save_hyperparameters({"root": root, "labels": labels, "multi_label": multi_label})
        if multi_label and labels is None:
            raise UserError(
                "multi_label is for labels in a CSV file, since an image lies in the folder of one class; set labels, "
                "or leave multi_label out."
            )
        self.root = Path(root).expanduser()
        self.layout = FolderLayout(self.root) if labels is None else CsvLayout(self.root, labels, multi_label)
        self._saved_partition: dict[str, Any] | None = None
        self._headers: dict[str, tuple[list[Path], list[Header]]] = {}

    @property
    def cache_folder(self) -> Path:
        """The hidden folder beside the images where a file of decoded ones may be written."""
        return self.root / ".kd_lightning"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the class folders, sorted; empty if no image is labelled."""
        return self.layout.classes

    @property
    def multi_label(self) -> bool:
        """Return whether an image may have several classes, as the CSV file of labels or the argument declares."""
        return self.layout.multi_label

    def load(self, split: str) -> ImageSet | StreamedImages | None:
        """List and check a split's files, and decode them if they fit into memory."""
        if split == "predict" and "test" in self.splits and not (self.root / "predict").is_dir():
            return self.splits["test"]
        listing = self._listing(split)
        if listing is None:
            return None
        found = listing.files
        if split == "train":
            self._read_headers(listing)
        listing, sizes = self._readable(split, listing)

        def in_form(form: ImageForm) -> ImageFiles:
            return ImageFiles(listing.labels, listing.files, sizes, form, len(self.mean), split == "predict")

        images = self.store(split, in_form, (int(sizes[0, 0]), int(sizes[0, 1])))
        if split == "predict":
            shown = {images.name(sample) for sample in range(len(images))}
            self.left_out = [_error_of(file) for file in found if str(file) not in shown]
        return images

    # --- the partition of a set whose folders are not splits, which Lightning keeps in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the partition into training, validation and test images, if there are no folders for them."""
        if "_partition" not in vars(self):
            return {}
        return {"partition": save_partition(self._partition, self._names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use the partition of a checkpoint, so that the same images are tested on."""
        self._saved_partition = state_dict.get("partition")
        drawn = vars(self).pop("_partition", None)
        if drawn is not None and any(
            not torch.equal(drawn.parts[split], samples) for split, samples in self._partition.parts.items()
        ):
            self.read_again()

    @cached_property
    def _labelled(self) -> Listing:
        return self.layout.training_images()

    @property
    def _names(self) -> list[str]:
        return [Path(os.path.relpath(file, self.root)).as_posix() for file in self._labelled.files]

    @cached_property
    def _partition(self) -> Partition:
        if self._saved_partition is not None:
            restored = restore_partition(self._saved_partition, self._names)
            if restored.changed:
                rank_zero_warn(f"{str(self.root)!r} has changed since the checkpoint was saved: {restored.changed}.")
            return restored
        drawn = draw_partition(
            self._labelled.labels,
            val_fraction=self.val_fraction,
            test_fraction=_TEST_FRACTION,
            seed=self.split_seed,
        )
        counts = {split: len(samples) for split, samples in drawn.parts.items()}
        rank_zero_info(
            f"{self.layout.one_set}: {counts['train']} images are trained on, {counts['val']} validated on and "
            f"{counts['test']} tested on, by split_seed {self.split_seed}."
        )
        return drawn

    # --- listing and checking

    def _listing(self, split: str) -> Listing | None:
        folder = self.root / split
        if split == "predict" and folder.is_dir():
            listing = self.layout.other_images(folder)
            if not listing.files:
                raise UserError(f"{str(folder)!r} holds no images that Pillow reads; put some there, or remove it.")
            return listing
        if self.layout.has_one_set and not self.classes and split == "predict":
            return self._labelled
        if self.layout.has_one_set and self.classes:
            split = "test" if split == "predict" else split
            part = self._partition.parts[split].tolist()
            if not part and self._saved_partition is not None:
                raise UserError(
                    f"{str(self.root)!r} holds none of the {split} images that the checkpoint names; put those of "
                    f"another set into {split}/<class>/, and set root to the folder above."
                )
            if not part:
                raise UserError(
                    f"{str(self.root)!r} has too few images in each class to divide them; {self.layout.advice(split)}."
                )
            listing = Listing([self._labelled.files[i] for i in part], self._labelled.labels[part])
            return self._with_unlabelled(listing) if split == "train" else listing
        if split == "train":
            return self._with_unlabelled(self._labelled)
        if split == "val" and not self.layout.has_split("val"):
            return None
        return self.layout.images_of("test" if split == "predict" else split)

    def _with_unlabelled(self, labelled: Listing) -> Listing:
        unlabelled = self.layout.unlabelled_images()
        files = labelled.files + unlabelled.files
        if not files:
            raise UserError(f"{str(self.root)!r} holds no training images; put them into train/<class>/.")
        return Listing(files, torch.cat([labelled.labels, unlabelled.labels]))

    def _read_headers(self, training: Listing) -> None:
        """Read those of test images too, where training would otherwise end before a broken one is named."""
        one_set = self.layout.has_one_set and bool(self.classes)
        others = [split for split in ("val", "test") if one_set or self.layout.has_split(split)]
        listings = {"train": training, **{split: self._listing(split) for split in others}}
        files = {split: listing.files for split, listing in listings.items() if listing}
        found = iter(_sizes_or_errors([file for some in files.values() for file in some]))
        self._headers = {split: (some, list(islice(found, len(some)))) for split, some in files.items()}
        errors = [
            one for _, all_of in self._headers.values() for one in all_of if isinstance(one, UnreadableImageError)
        ]
        if errors:
            raise UserError(describe_unreadable(errors, sum(map(len, files.values()))))

    def _readable(self, split: str, listing: Listing) -> tuple[Listing, Tensor]:
        """Return the files that are images, by their headers, and the size of each, int64 ``(N, 2)``.

        Of those that are predicted, others are left out; otherwise they are an error.
        """
        skip_unreadable = split == "predict"
        files, found = self._headers.pop(split, ([], []))
        if files != listing.files:
            found = _sizes_or_errors(listing.files)
        errors = [result for result in found if isinstance(result, UnreadableImageError)]
        sizes = {row: result for row, result in enumerate(found) if isinstance(result, tuple)}
        if errors:
            message = describe_unreadable(errors, len(found))
            if not (skip_unreadable and sizes):
                raise UserError(message)
            rank_zero_warn(f"Left out: {message}")
        (first, common), *_ = sizes.items()
        for row, (height, width) in sizes.items():
            if self.size is None and (height, width) != common:
                raise SizesDifferError(
                    f"{str(listing.files[row])!r} has {width}x{height} pixels and {str(listing.files[first])!r} "
                    f"{common[1]}x{common[0]}; set image_size to resize all images."
                )
        rows = list(sizes)
        readable = Listing([listing.files[row] for row in rows], listing.labels[rows])
        return readable, torch.tensor(list(sizes.values()), dtype=torch.int64)


def _sizes_or_errors(files: list[Path]) -> list[Header]:
    found: list[Header] = []
    shown = getattr(rank_zero_only, "rank", 0) == 0
    with ThreadPoolExecutor() as pool, progress("Reading sizes", len(files), visible=shown) as advance:
        for result in pool.map(_size_or_error, files):
            found.append(result)
            advance(1)
    return found


def _size_or_error(file: Path) -> Header:
    try:
        return shown_size(file)
    except UnreadableImageError as error:
        return error


def _error_of(file: Path) -> UnreadableImageError:
    """Return the error of a file that is no image, or whose pixels are damaged, as its header may be whole."""
    result = _size_or_error(file)
    return result if isinstance(result, UnreadableImageError) else unreadable(file)
