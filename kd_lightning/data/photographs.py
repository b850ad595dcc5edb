"""The base of the data modules over images of any size, which are decoded, resized and cut."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.data.augmentation.resized_crop import ResizedCrop
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.image_form import ImageForm, OriginalForm, PreparedForm, ShrunkForm
from kd_lightning.data.image_set import ImageSet, ImageSource, Selection, StreamedImages, image_bytes
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.packed_file import pack_to_file, packed_file
from kd_lightning.data.packed_images import KeptImages, PackedImages, pack_in_memory, stack_in_memory
from kd_lightning.data.protocol import KnowsInputs
from kd_lightning.data.sizes import CROP_FILTERS, Sizes, Wanted, choose_sizes
from kd_lightning.data.splits import stratified_split
from kd_lightning.data.storage_place import OFF, Resources, choose_place, free_disk
from kd_lightning.errors import UserError
from kd_lightning.files.memory import available_memory
from kd_lightning.files.prepare import Preparation
from kd_lightning.networks.data_config import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SizesDifferError(UserError):
    """Images of different sizes, where none is asked for."""


InForm = Callable[[ImageForm], ImageSource]
"""Returns the images of a split in a form."""


class PhotographDataModule(ImageDataModule, ABC):
    """Images of any size, decoded once if they fit into memory and cut to the size of the networks.

    Size, crop, interpolation and statistics that are not given are those of the network that is trained, if it has
    trained weights whose input is known, or else those of the teacher; otherwise images keep their size, and the
    statistics are ImageNet's.

    Images for evaluation keep their shape: the shorter side is resized to the size of the network, the centre is cut
    out. Those for training are random boxes of the image, cut from stored ones whose shorter side is at most
    ``store_size``; without random resized crops they are prepared as for evaluation. A teacher is evaluated on images
    as its own weights expect them, and sees the same box of a training image at its size and with its interpolation.

    Args:
        image_size: Height and width of training images.
        default_size: Height and width where ``image_size`` is not given and no network knows its own; without it, such
            images keep their size.
        eval_size: Height and width of the others; by default ``image_size`` where that is given.
        teacher_size: Height and width of the same views for the teacher; by default those of its own weights, or of
            the other images.
        eval_crop: Part of the side of a resized image that is cut out for evaluation, in (0, 1].
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        store_size: Largest shorter side of the images that random crops are cut from; by default 1.15 times the largest
            size.
        mean: Mean of each channel of images in [0, 1]; a single one turns images grey.
        std: Standard deviation of each channel.
        memory_limit: GiB of a node's memory for decoded images; half of what is available by default.
        cache: Folder of a file of decoded images, which all processes and later runs share. By default there is one
            beside the images, in a hidden folder, if they do not fit into memory or there are several processes;
            ``"off"`` for none.
        **options: Arguments of :class:`ImageDataModule`.

    Raises:
        UserError: If an argument is outside its range.
    """

    default_augmentation = Augmentation(resized_crop=True, flip=True)
    reading_threads: int | None = None
    """Threads that decode images, ``None`` for one a core."""
    size_is_known = True
    """Whether images have one size, or get one; otherwise that of a network whose checkpoint is loaded later."""

    def __init__(
        self,
        *,
        image_size: int | None = None,
        default_size: int | None = None,
        eval_size: int | None = None,
        teacher_size: int | None = None,
        eval_crop: float | None = None,
        interpolation: str | None = None,
        store_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        memory_limit: float | None = None,
        cache: str | None = None,
        **options: Any,
    ) -> None:
        self.given = Wanted(image_size, eval_size, teacher_size, eval_crop, interpolation, store_size)
        Wanted(default_size).check("default_size")
        self.default_size = default_size
        self.given_statistics = DataConfig.of(mean, std)
        statistics = DataConfig(IMAGENET_MEAN, IMAGENET_STD) if mean is None else self.given_statistics
        assert statistics.mean is not None
        assert statistics.std is not None
        super().__init__(mean=statistics.mean, std=statistics.std, **options)
        if len(self.mean) not in (1, 3):
            raise UserError(
                f"Images are read with 3 channels, or 1 for grey, but mean has {len(self.mean)} values; give 3 or 1."
            )
        given = {**self.given._asdict(), "default_size": default_size, "mean": mean, "std": std}
        arguments = {**given, "memory_limit": memory_limit, "cache": cache}
        self.save_hyperparameters(arguments)
        if memory_limit is not None and not memory_limit >= 0:
            raise UserError(f"memory_limit must be >= 0 GiB, got {memory_limit}.")
        if store_size is not None and not self.augmentation.resized_crop:
            raise UserError(
                "store_size is the size of images that random crops are cut from; set augmentation.resized_crop, or "
                "leave store_size out."
            )
        self.memory_limit = memory_limit
        self.cache = cache
        self._has_said = False
        self.sizes: Sizes | None = None
        self._kept_bytes = 0
        self.follow_networks({})

    # --- sizes and statistics

    def follow_networks(self, known: Mapping[str, DataConfig]) -> None:
        """Take what is not given from the first network that knows it; images that were read are read again.

        Args:
            known: The input that each network expects, by its name for the message.

        Raises:
            UserError: If sizes do not go together.
        """
        before, pixels_before = (self.sizes, self.mean, self.std), (self.sizes, len(self.mean))
        has_teacher = not known or "the teacher" in known
        given = self.given if has_teacher else self.given._replace(teacher_size=None)
        uses_default = given.image_size is None and not _first(known, "preparation")[1]
        if uses_default and self.default_size is not None:
            sizes, _ = choose_sizes(given._replace(image_size=self.default_size), known)
            origin = "default"
        else:
            sizes, origin = choose_sizes(given, known)
        self.sizes = None if sizes is None else self._possible(sizes)
        statistics, whose = _first(known, "mean")
        if self.given_statistics.mean is not None:
            statistics, whose = self.given_statistics, "given"
        if statistics.mean is not None and statistics.std is not None:
            self.mean, self.std = statistics.mean, statistics.std
            for augmenter in self.augmenters:
                augmenter.mean, augmenter.std = self.mean, self.std
        self.size = None if self.sizes is None else self.sizes.training.size
        self.size_is_known = True
        if (self.sizes, self.mean, self.std) == before:
            return
        if known and self.sizes is not None:
            rank_zero_info(self._describe(origin, whose))
        if (self.sizes, len(self.mean)) != pixels_before:
            self.read_again()

    def _possible(self, sizes: Sizes) -> Sizes:
        """Return sizes whose preparations for the teacher are those that it sees."""
        if self.domain:  # in a pair, which has one size for all networks
            return sizes._replace(teacher_training=None, teacher_evaluation=None)
        if sizes.teacher_training is None or not self.augmentation.padding:
            return sizes
        (height, width), (high, wide) = sizes.training.size, sizes.teacher_training.size
        if (height, width) != (high, wide):
            raise UserError(
                f"augmentation.padding counts pixels of one size, but the teacher's images have {high}x{wide} and the "
                f"others {height}x{width}; set augmentation.resized_crop to true, or teacher_size and image_size alike."
            )
        return sizes._replace(teacher_training=sizes.training)  # padded crops are cut for one network

    def read_again(self) -> None:
        """Read the splits that were read before, after what decides their images has changed."""
        read = list(self.splits)
        self.splits.clear()
        for augmenter in self.augmenters:
            augmenter.clear()
        self._kept_bytes = 0
        for split in read:
            self.splits.read(split)

    def setup(self, stage: str | None = None) -> None:
        """Take sizes and statistics from the networks, and read the splits that a stage needs."""
        module = getattr(self.trainer, "lightning_module", None)
        if isinstance(module, KnowsInputs):
            known = module.known_inputs()
            if stage == "fit" and self.given.teacher_size is not None and "the teacher" not in known:
                rank_zero_warn(f"teacher_size is not used, since {type(module).__name__} has no teacher here.")
            self.follow_networks(known)
        try:
            super().setup(stage)
        except SizesDifferError:
            if stage in (None, "fit"):
                raise
            self.size_is_known = False  # until the checkpoint is loaded, which follows this hook

    @property
    def preparation(self) -> Preparation | None:
        """The preparation of images for evaluation, if they are resized or cropped."""
        return None if self.sizes is None else self.sizes.evaluation

    @property
    def train_size(self) -> tuple[int, int] | None:
        """Height and width of training images, if they differ from those for evaluation."""
        if self.sizes is None or self.sizes.training.size == self.sizes.evaluation.size:
            return None
        return self.sizes.training.size

    @property
    def teacher_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of training images for the teacher, ``None`` where all networks see one size."""
        if self.sizes is None or self.sizes.teacher_training is None:
            return None
        size = self.sizes.teacher_training.size
        return None if size == self.sizes.training.size else (len(self.mean), *size)

    def _describe(self, origin: str, whose: str) -> str:
        assert self.sizes is not None
        statistics = "ImageNet's mean and std" if not whose else f"mean and std {_origin(whose)}"
        return f"Data: images of {self.sizes.describe(_origin(origin))}, {statistics}."

    def store(self, split: str, in_form: InForm, original: tuple[int, int]) -> ImageSet | StreamedImages:
        """Return the images of a split as this module shows them, decoded into memory if they fit.

        Args:
            split: Name of the split.
            in_form: Returns its images in a form.
            original: Common size of the images, where ``image_size`` is not given.
        """
        sizes = self.sizes
        if sizes is None:
            return self._stacked(in_form(OriginalForm(*original)), split)
        if split == "train":
            return self._training_images(sizes, in_form)
        plain = in_form(PreparedForm(sizes.evaluation))
        if sizes.teacher_evaluation is None or split == "predict":  # which no teacher sees
            return self._stacked(plain, split)
        for_teacher = in_form(PreparedForm(sizes.teacher_evaluation))
        return StreamedImages(
            self._kept(plain, split), sizes.evaluation.size, teacher_plain=self._kept(for_teacher, f"{split}-teacher")
        )

    def _training_images(self, sizes: Sizes, in_form: InForm) -> ImageSet | StreamedImages:
        """Return training images, and those among them that are validated on as they are evaluated."""
        in_training = in_form(PreparedForm(sizes.training))
        cuts = bool(self.augmentation.resized_crop)
        if not cuts and sizes.training == sizes.evaluation and sizes.teacher_training is None:
            return self._stacked(in_training, "train")
        teacher_training, teacher_evaluation = sizes.teacher_training, sizes.teacher_evaluation
        crop = teacher_images = None
        if cuts:
            images = self._kept(in_form(ShrunkForm(sizes.store_size, sizes.training.interpolation)), "train")
            crop = self._crop(sizes.training, teacher_training)
        else:
            images = self._kept(in_training, "train")
            if teacher_training not in (None, sizes.training):
                assert teacher_training is not None
                teacher_images = self._kept(in_form(PreparedForm(teacher_training)), "train-teacher")
        held_out, plain, teacher_plain = self._held_out(images.labels), None, None
        if cuts or sizes.evaluation != sizes.training:
            plain = self._kept_partly(in_form(PreparedForm(sizes.evaluation)), held_out, "val")
        if teacher_images is not None and teacher_evaluation == teacher_training:
            teacher_plain = teacher_images
        elif teacher_evaluation is not None:
            teacher_plain = self._kept_partly(in_form(PreparedForm(teacher_evaluation)), held_out, "val-teacher")
        return StreamedImages(
            images,
            sizes.training.size,
            crop=crop,
            plain=plain,
            teacher_images=teacher_images,
            teacher_plain=teacher_plain,
        )

    def _crop(self, training: Preparation, teacher: Preparation | None) -> ResizedCrop:
        """Return what cuts random boxes, for the teacher too where its views have another size or filter."""
        size, interpolation = training.size, _crop_filter(training)
        if teacher is None or (teacher.size, _crop_filter(teacher)) == (size, interpolation):
            return self._resized_crop(size, interpolation=interpolation)
        return self._resized_crop(
            size,
            interpolation=interpolation,
            teacher_size=teacher.size,
            teacher_interpolation=_crop_filter(teacher),
        )

    def _held_out(self, labels: Tensor) -> Tensor:
        """Return the training images that are validated on."""
        if self.splits.has_val:
            return torch.empty(0, dtype=torch.int64)
        return stratified_split(labels, fraction=self.val_fraction, seed=self.split_seed)[1]

    def faster_reading(self) -> list[str]:
        """Return imperatives with the settings that shorten the time in which training waits for images."""
        images = self.splits["train"]
        if not isinstance(images, StreamedImages) or isinstance(images.images, PackedImages):
            return super().faster_reading()
        settings = f"{self.setting('memory_limit')} and {self.setting('cache')}"
        return [f"keep the decoded images (see {settings})", *super().faster_reading()]

    # --- the place where decoded images are kept

    @property
    @abstractmethod
    def cache_folder(self) -> Path:
        """The folder beside the images where a file of decoded ones may be written."""

    @property
    def cache_owner(self) -> str:
        """The name of the set of images, by which its files differ from those of others in one folder."""
        return str(self.cache_folder.absolute())

    @property
    def may_keep(self) -> bool:
        """Return whether images may be decoded once for all epochs."""
        return True

    def _stacked(self, source: ImageSource, split: str) -> ImageSet | StreamedImages:
        """Return images of one size: in memory, where batches are gathered on the device, in a file, or undecoded."""
        height, width = source.sizes[0].tolist()
        padded = (height + 2 * self.augmenter.padding) * (width + 2 * self.augmenter.padding) * 4
        place, name = self._place(source, split, needed=image_bytes(source) + len(source) * padded)
        if place == "memory":
            return stack_in_memory(source, threads=self.reading_threads)
        return StreamedImages(source if place == "workers" else self._mapped(source, name), (height, width))

    def _kept(self, source: ImageSource, split: str) -> ImageSource:
        """Return a source whose images are decoded once, in memory or in a file, if there is room."""
        place, name = self._place(source, split, needed=image_bytes(source))
        if place == "workers":
            return source
        return pack_in_memory(source, threads=self.reading_threads) if place == "memory" else self._mapped(source, name)

    def _mapped(self, source: ImageSource, name: str) -> PackedImages:
        return pack_to_file(source, self._folder, name=name, threads=self.reading_threads)

    def _kept_partly(self, source: ImageSource, samples: Tensor, split: str) -> ImageSource:
        """Return a source of which some images are decoded once, in memory or in a file, if there is room."""
        if not len(samples):
            return source
        chosen = Selection(source, samples)
        kept = self._kept(chosen, split)
        return KeptImages(source, kept, samples) if isinstance(kept, PackedImages) else source

    def _place(self, source: ImageSource, split: str, *, needed: int) -> tuple[str, str]:
        """Return where the images of a source are kept, and the beginning of the name of their file."""
        owner = f"{self.cache_owner} {split} {self.sizes} {self.split_seed} {self.val_fraction}"
        name = f"{split}-{hashlib.sha256(owner.encode()).hexdigest()[:12]}"
        if not self.may_keep:
            return "workers", name
        world_size, _ = self._ranks
        processes = max(1, world_size // getattr(self.trainer, "num_nodes", 1))
        resources = Resources(processes, available_memory(), free_disk(self._folder))
        # the files are looked at only where there may be one
        written = self.cache != OFF and self._folder.is_dir() and packed_file(source, self._folder, name=name).exists()
        choice = choose_place(
            needed,
            resources,
            memory_limit=self.memory_limit,
            cache=self.cache,
            written=written,
            kept=self._kept_bytes,
        )
        if choice.place == "memory":
            self._kept_bytes += needed
        if split == "train" and not self._has_said:
            self._has_said = True
            rank_zero_info(f"Data: {choice.reason}")
        return choice.place, name

    @property
    def _folder(self) -> Path:
        return self.cache_folder if self.cache in (None, OFF) else Path(str(self.cache)).expanduser()


def _first(known: Mapping[str, DataConfig], field: str) -> tuple[DataConfig, str]:
    """Return the first configuration in which a field is known, and its name."""
    for name, config in known.items():
        if getattr(config, field) is not None:
            return config, name
    return DataConfig(), ""


def _origin(name: str) -> str:
    return {"given": "as given", "default": "by default", "": "as given"}.get(name, f"of {name}")


def _crop_filter(preparation: Preparation) -> str:
    """Return the filter of random crops: that of the evaluation, or the one of torch that is closest."""
    return preparation.interpolation if preparation.interpolation in CROP_FILTERS else "bicubic"
