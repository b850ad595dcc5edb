"""Any map-style data set of images and labels: torchvision's, Hugging Face's, a user's own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.image_form import ImageForm, stored_sizes, to_pixels
from kd_lightning.data.image_set import ImageSet, StreamedImages
from kd_lightning.data.labels import check_labels
from kd_lightning.data.photographs import PhotographDataModule, SizesDifferError
from kd_lightning.data.samples import Label, Samples
from kd_lightning.errors import UserError
from kd_lightning.files.progress import progress

_PROBES = 8


@dataclass(frozen=True, eq=False)
class DatasetImages:
    """Images of a data set, brought into the form in which they are stored.

    Attributes:
        samples: The data set.
        labels: int64 ``(N,)``, -1 where unlabelled; of several classes floats ``(N, C)``.
        original_sizes: Height and width of each image, int64 ``(N, 2)``.
        form: Brings each image into its stored form.
        channels: 3 for RGB, 1 for grey.
        digest: Digest of the data set.
    """

    samples: Samples
    labels: Tensor
    original_sizes: Tensor
    form: ImageForm
    channels: int
    digest: str
    skip_unreadable = False

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each image in its stored form, int64 ``(N, 2)``."""
        return stored_sizes(self.form, self.original_sizes)

    def read(self, sample: int) -> Tensor:
        """Return an image, uint8 ``(channels, H, W)``."""
        image = self.samples.image(sample, self.channels)
        return to_pixels(self.form(image, f"sample {sample} of {self.samples.name}"), self.channels)

    def name(self, sample: int) -> str:
        """Return the number of an image."""
        return str(sample)

    def content(self) -> bytes:
        """Return what a fingerprint of the images covers."""
        return f"{self.digest} {self.form!r} {self.channels}".encode()


class DatasetDataModule(PhotographDataModule):
    """Any map-style data set of ``(image, label)``: torchvision's, Hugging Face's, one of your own.

    An image is a PIL image, or a tensor ``(channels, H, W)`` of bytes or of floats in [0, 1]; a label is a class index,
    or ``None`` where there is none. Lists of class indices declare that an image may have several classes; an empty one
    is an image with none of them. The images are resized, augmented, normalized and cached as those of
    :class:`ImageFolderDataModule`, so the data sets need no transform. One that returns another image each time, by a
    random transform of its own, is read again in each epoch, and cannot have ``views``. Each data set is read once at
    the start, for its labels and sizes.

    Args:
        train: Training samples.
        val: Validation samples; by default ``val_fraction`` of each class of ``train``.
        test: Test samples, which ``predict`` shows as well.
        num_classes: Number of classes; by default those that the data set names, or else one more than the largest
            label of ``train``.
        image_key: Key of the image, where samples are mappings.
        label_key: Key of the label.
        **options: Arguments of :class:`PhotographDataModule` and :class:`ImageDataModule`.

    Raises:
        UserError: If a data set has no length, or a sample is not an image and a label.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> data = DatasetDataModule(FakeData(40, (3, 30, 50)), num_classes=10, image_size=24, batch_size=8)
        >>> data.augment(next(iter(data.train_dataloader()))).images.shape
        torch.Size([8, 3, 24, 24])
    """

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse takes no subclasses of Dataset[Any]
        val: Dataset | None = None,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        *,
        num_classes: int | None = None,
        image_key: str = "image",
        label_key: str = "label",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if num_classes is not None and num_classes < 1:
            raise UserError(f"num_classes must be >= 1, got {num_classes}.")
        self.save_hyperparameters({"num_classes": num_classes, "image_key": image_key, "label_key": label_key})
        given = {"train": train, "val": val, "test": test}
        self._samples = {
            name: Samples(dataset, name, image_key, label_key) for name, dataset in given.items() if dataset is not None
        }
        self._given_classes = num_classes
        self._scanned: dict[str, tuple[list[Label], Tensor]] = {}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the training set, or numbers."""
        dataset = self._samples["train"].dataset
        names = getattr(dataset, "classes", None)
        if names is None and hasattr(dataset, "features"):  # of Hugging Face
            feature = dataset.features.get(self._samples["train"].label_key)
            names = getattr(getattr(feature, "feature", feature), "names", None)  # of one class, or of each in a list
        count = self._given_classes
        if isinstance(names, Sequence) and count in (None, len(names)):
            return tuple(map(str, names))
        if count is None:
            labels = self._scan("train")[0]
            count = 1 + max(max(label, default=-1) if isinstance(label, tuple) else label for label in labels)
        return tuple(map(str, range(count)))

    @cached_property
    def multi_label(self) -> bool:
        """Return whether an image may have several classes: the labels of ``train`` are lists, as its first one is."""
        samples = self._samples["train"]
        labels = map(samples.label, range(len(samples)))
        return isinstance(next((label for label in labels if label != -1), None), tuple)

    @cached_property
    def may_keep(self) -> bool:
        """Return whether samples are the same each time they are read."""
        samples = self._samples["train"]
        for number in range(0, len(samples), max(1, len(samples) // _PROBES)):
            first, second = (np.asarray(samples.image(number, len(self.mean))) for _ in range(2))
            if first.shape == second.shape and np.array_equal(first, second):
                continue
            if self.views is not None:
                raise UserError(
                    f"views need images that stay the same, but train returns another image for sample {number} each "
                    "time; remove random transforms from it (augmentation does that), or set views to null."
                )
            rank_zero_info("Data: train returns other images each time, so they are read again in each epoch.")
            return False
        return True

    reading_threads = 1
    """A data set may share a file among its samples, which several threads would read from wrong places."""

    @property
    def cache_folder(self) -> Path:
        """The hidden folder beside the data set's files where a file of decoded ones may be written."""
        return Path(str(getattr(self._samples["train"].dataset, "root", "."))).expanduser() / ".kd_lightning"

    @property
    def cache_owner(self) -> str:
        """The name of the data set."""
        return f"{super().cache_owner} {type(self._samples['train'].dataset).__name__} {len(self._samples['train'])}"

    def load(self, split: str) -> ImageSet | StreamedImages | None:
        """Read labels and sizes of a split, and keep its images if they fit."""
        if split == "predict" and "test" in self.splits:
            return self.splits["test"]
        name = "test" if split == "predict" else split
        samples = self._samples.get(name)
        if samples is None:
            return None
        found, sizes = self._scan(name)
        labels = self._as_tensor(found, name)
        if self.size is None and len(sizes.unique(dim=0)) > 1:
            raise SizesDifferError(f"The images of {name} have different sizes; set image_size to resize them.")
        digest = self._digest(samples, labels, sizes)

        def in_form(form: ImageForm) -> DatasetImages:
            return DatasetImages(samples, labels, sizes, form, len(self.mean), digest)

        return self.store(split, in_form, (int(sizes[0, 0]), int(sizes[0, 1])))

    def _as_tensor(self, labels: list[Label], name: str) -> Tensor:
        """Return labels as int64 ``(N,)``; of several classes 1 for each of them and 0 for the others, ``(N, C)``."""
        kind = tuple if self.multi_label else int
        for number, label in enumerate(labels):
            if not isinstance(label, kind) and label != -1:
                one = "a list" if isinstance(label, tuple) else "one class"
                raise UserError(
                    f"The label of sample {number} of {name} is {one}, and that of others in train is not; give all "
                    "images a list of their classes, of one too, or each one class."
                )
            if isinstance(label, tuple) and max(label, default=0) >= self.num_classes:
                check_labels(torch.tensor(label), num_classes=self.num_classes, split=name)
        if not self.multi_label:
            return torch.tensor(labels)
        rows = torch.zeros(len(labels), self.num_classes)
        for row, label in zip(rows, labels, strict=True):
            row[list(label) if isinstance(label, tuple) else slice(None)] = -1.0 if label == -1 else 1.0
        return rows

    def _scan(self, name: str) -> tuple[list[Label], Tensor]:
        """Return label and size of each sample."""
        if name not in self._scanned:
            samples = self._samples[name]
            if not len(samples):
                raise UserError(f"{name} is empty; give a data set with samples.")
            labels, sizes = [], []
            shown = getattr(rank_zero_only, "rank", 0) == 0
            with progress(f"Reading the labels of {name}", len(samples), visible=shown) as advance:
                for number in range(len(samples)):
                    label, size = samples.label_and_size(number)
                    labels.append(label)
                    sizes.append(size)
                    advance(1)
            self._scanned[name] = labels, torch.tensor(sizes)
        return self._scanned[name]

    def _digest(self, samples: Samples, labels: Tensor, sizes: Tensor) -> str:
        """Return a digest of all labels and sizes, and of the pixels of some samples."""
        digest = hashlib.sha256(type(samples.dataset).__name__.encode())
        digest.update(labels.numpy().tobytes() + sizes.numpy().tobytes())
        for number in range(0, len(samples), max(1, len(samples) // (4 * _PROBES))):
            digest.update(samples.image(number, len(self.mean)).tobytes())
        return digest.hexdigest()
