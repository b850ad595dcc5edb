"""Any map-style data set of images and labels: torchvision's, Hugging Face's, a user's own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from kd_lightning.data.image_form import ImageForm, mode_of, stored_sizes, to_pixels
from kd_lightning.data.image_set import ImageSet, StreamedImages
from kd_lightning.data.photographs import PhotographDataModule, SizesDifferError
from kd_lightning.errors import UserError
from kd_lightning.files.images import as_shown
from kd_lightning.files.progress import progress

_PROBES = 8


@dataclass(frozen=True)
class Samples:
    """The samples of a data set, as ``(image, label)``.

    Attributes:
        dataset: Anything with a length and ``dataset[i]``, which is ``(image, label, ...)`` or a mapping.
        name: Name of the argument that it was given as, for messages.
        image_key: Key of the image in a mapping.
        label_key: Key of the label in a mapping.
    """

    dataset: Any
    name: str
    image_key: str
    label_key: str

    def __post_init__(self) -> None:
        if isinstance(self.dataset, IterableDataset) or not all(
            hasattr(self.dataset, method) for method in ("__len__", "__getitem__")
        ):
            raise UserError(
                f"{self.name} must have a length and dataset[i], which {type(self.dataset).__name__} does not have; "
                "collect its samples in a list, or give the Trainer a DataLoader of your own."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        sample = self.dataset[number]
        if isinstance(sample, Mapping):
            for key in (self.image_key, self.label_key):
                if key not in sample:
                    there = ", ".join(map(repr, sample))
                    raise UserError(
                        f"Sample {number} of {self.name} has no {key!r}, but {there}; set image_key and label_key."
                    )
            return sample[self.image_key], sample[self.label_key]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            raise UserError(
                f"Sample {number} of {self.name} must be (image, label) or a mapping, got {type(sample).__name__}; "
                "change what the data set returns."
            )
        return sample[0], sample[1]

    def image(self, number: int, channels: int) -> Image.Image:
        """Return the image of a sample as a viewer shows it, with 1 or 3 channels."""
        return as_shown(self._picture(self[number][0], number), mode_of(channels))

    def label_and_size(self, number: int) -> tuple[int, tuple[int, int]]:
        """Return the class index of a sample, -1 where it is ``None``, and height and width of its image."""
        image, label = self[number]
        shown = as_shown(self._picture(image, number), "L")  # turned as a viewer turns it
        return self._class_index(label, number), (shown.height, shown.width)

    def _class_index(self, label: Any, number: int) -> int:
        if isinstance(label, Tensor):
            label = label.numpy()
        if isinstance(label, np.ndarray) and label.size == 1:
            label = label.item()
        if label is None:
            return -1
        if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
            raise UserError(
                f"The label of sample {number} of {self.name} must be an integer, or None, got "
                f"{type(label).__name__}; convert it in the data set (images of several classes are read by "
                "ImageFolderDataModule with labels in a CSV file)."
            )
        return int(label)

    def _picture(self, image: Any, number: int) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        pixels = image.numpy() if isinstance(image, Tensor) else image
        if not isinstance(pixels, np.ndarray) or pixels.ndim not in (2, 3):
            raise UserError(
                f"The image of sample {number} of {self.name} must be a PIL image or a tensor (channels, H, W), got "
                f"{type(image).__name__}; change what the data set returns."
            )
        if isinstance(image, Tensor) and pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype.kind == "f":
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise UserError(
                    f"The image of sample {number} of {self.name} has values outside [0, 1]; remove Normalize from its "
                    "transform, since the data module normalizes with mean and std."
                )
            pixels = np.rint(pixels * 255).astype(np.uint8)
        if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
            raise UserError(
                f"The image of sample {number} of {self.name} must have bytes or floats and 1 or 3 channels, got "
                f"{pixels.dtype} {tuple(image.shape)}; a tensor is (channels, H, W), an array (H, W, channels)."
            )
        return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


@dataclass(frozen=True, eq=False)
class DatasetImages:
    """Images of a data set, brought into the form in which they are stored.

    Attributes:
        samples: The data set.
        labels: int64 ``(N,)``, -1 where unlabelled.
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
    or ``None`` where there is none. The images are resized, augmented, normalized and cached as those of
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
        self._scanned: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the training set, or numbers."""
        dataset = self._samples["train"].dataset
        names = getattr(dataset, "classes", None)
        if names is None and hasattr(dataset, "features"):  # of Hugging Face
            names = getattr(dataset.features.get(self._samples["train"].label_key), "names", None)
        count = self._given_classes
        if isinstance(names, Sequence) and count in (None, len(names)):
            return tuple(map(str, names))
        return tuple(map(str, range(int(self._scan("train")[0].max()) + 1 if count is None else count)))

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
        labels, sizes = self._scan(name)
        if self.size is None and len(sizes.unique(dim=0)) > 1:
            raise SizesDifferError(f"The images of {name} have different sizes; set image_size to resize them.")
        digest = self._digest(samples, labels, sizes)

        def in_form(form: ImageForm) -> DatasetImages:
            return DatasetImages(samples, labels, sizes, form, len(self.mean), digest)

        return self.store(split, in_form, (int(sizes[0, 0]), int(sizes[0, 1])))

    def _scan(self, name: str) -> tuple[Tensor, Tensor]:
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
            self._scanned[name] = torch.tensor(labels), torch.tensor(sizes)
        return self._scanned[name]

    def _digest(self, samples: Samples, labels: Tensor, sizes: Tensor) -> str:
        """Return a digest of all labels and sizes, and of the pixels of some samples."""
        digest = hashlib.sha256(type(samples.dataset).__name__.encode())
        digest.update(labels.numpy().tobytes() + sizes.numpy().tobytes())
        for number in range(0, len(samples), max(1, len(samples) // (4 * _PROBES))):
            digest.update(samples.image(number, len(self.mean)).tobytes())
        return digest.hexdigest()
