"""The sizes of images: in training, in evaluation and for the teacher; what is not given is taken from the networks."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import NamedTuple

from kd_lightning.errors import UserError
from kd_lightning.files.prepare import Preparation
from kd_lightning.networks.data_config import DataConfig

CROP_FILTERS = ("bilinear", "bicubic")
"""Filters with which random crops are resized."""
_STORE = 1.15


class Wanted(NamedTuple):
    """Sizes that the user asks for; see :class:`~kd_lightning.data.photographs.PhotographDataModule`."""

    image_size: int | None = None
    eval_size: int | None = None
    teacher_size: int | None = None
    eval_crop: float | None = None
    interpolation: str | None = None
    store_size: int | None = None

    def check(self, image_size: str = "image_size") -> None:
        """Raise an error if a value is outside its range; ``image_size`` is the name of the first for the message."""
        for name in ("image_size", "eval_size", "teacher_size", "store_size"):
            size = getattr(self, name)
            if size is not None and not (isinstance(size, Integral) and int(size) >= 1):
                shown = image_size if name == "image_size" else name
                raise UserError(f"{shown} must be a number of pixels >= 1, got {size!r}.")
        if self.eval_crop is not None and not 0 < self.eval_crop <= 1:
            raise UserError(f"eval_crop must be in (0, 1], got {self.eval_crop}.")
        if self.interpolation not in (None, *CROP_FILTERS):
            raise UserError(f"interpolation must be {' or '.join(CROP_FILTERS)}, got {self.interpolation!r}.")


class Sizes(NamedTuple):
    """Preparations of images for the networks.

    Attributes:
        training: Preparation of training images, as far as they are not cut at random.
        evaluation: Preparation of the others.
        teacher_training: Preparation of training images for the teacher, of the same part of each image as for the
            trained network; ``None``, as the next one, if the teacher sees the same images.
        teacher_evaluation: Preparation of the others for the teacher: its own.
        store_size: Largest shorter side of the images that random crops are cut from.
    """

    training: Preparation
    evaluation: Preparation
    teacher_training: Preparation | None
    teacher_evaluation: Preparation | None
    store_size: int

    def describe(self, origin: str) -> str:
        """Return the sizes in words, and in what the teacher's images differ from those of the trained network.

        Args:
            origin: Words for whose sizes they are.

        Example:
            >>> Sizes(Preparation.of(24), Preparation.of(30), None, None, 35).describe("as given")
            '24x24 in training and 30x30 in evaluation (as given)'
        """
        sizes = self.training.size, self.evaluation.size
        words = f"{_in_words(*sizes)} ({origin})"
        if self.teacher_training is None or self.teacher_evaluation is None:
            return words
        teacher_sizes = self.teacher_training.size, self.teacher_evaluation.size
        if teacher_sizes != sizes:
            return f"{words}, {_in_words(*teacher_sizes)} for the teacher"
        if self.teacher_training != self.training:
            return f"{words}, resized by {self.teacher_evaluation.interpolation} interpolation for the teacher"
        return f"{words}, resized and cropped for the teacher in evaluation as its weights expect"


def _in_words(training: tuple[int, int], evaluation: tuple[int, int]) -> str:
    first, second = (f"{height}x{width}" for height, width in (training, evaluation))
    return first if first == second else f"{first} in training and {second} in evaluation"


def choose_sizes(wanted: Wanted, known: Mapping[str, DataConfig]) -> tuple[Sizes | None, str]:
    """Return the sizes, and whose they are: what is given, else of the first network that knows it.

    Args:
        wanted: Sizes that the user asks for.
        known: The input that each network expects, by name; ``"the teacher"`` may see images in another preparation.

    Returns:
        ``None`` if no size is known.

    Raises:
        UserError: If a value is outside its range, or sizes do not go together.
    """
    wanted.check()
    origin = next((name for name, config in known.items() if config.preparation is not None), "")
    own, train_size = (known[origin].preparation, known[origin].train_size) if origin else (None, None)
    if wanted.image_size is not None:
        own, origin = own or Preparation.of(wanted.image_size), "given"
    if own is None:
        unused = [name for name, value in wanted._asdict().items() if value is not None]
        if unused:
            raise UserError(f"{unused[0]} needs the size of the images; set image_size.")
        return None, ""
    training = _as_wanted(own, wanted, wanted.image_size or train_size or own.size)
    evaluation = _as_wanted(own, wanted, wanted.eval_size or wanted.image_size or own.size)
    teacher_training, teacher_evaluation = _for_teacher(
        wanted, known.get("the teacher", DataConfig()), training, evaluation
    )
    largest = max(
        side
        for shown in (training, evaluation, teacher_training, teacher_evaluation)
        if shown is not None
        for side in shown.size
    )
    if wanted.store_size is not None and wanted.store_size < largest:
        raise UserError(f"store_size must be at least {largest}, the largest size, got {wanted.store_size}.")
    store_size = wanted.store_size or math.ceil(_STORE * largest)
    return Sizes(training, evaluation, teacher_training, teacher_evaluation, store_size), origin


def _as_wanted(own: Preparation, wanted: Wanted, size: int | tuple[int, int]) -> Preparation:
    """Return a preparation at a size, with the interpolation and the crop that the user wants."""
    found = own.at(size)
    if wanted.interpolation is not None:
        found = found._replace(interpolation=wanted.interpolation)
    if wanted.eval_crop is None:
        return found
    high, wide = (math.floor(side / wanted.eval_crop) for side in found.size)
    return found._replace(resize=(high, wide))


def _for_teacher(
    wanted: Wanted, teacher: DataConfig, training: Preparation, evaluation: Preparation
) -> tuple[Preparation, Preparation] | tuple[None, None]:
    """Return how images are prepared for the teacher in training and in evaluation, ``None`` if as for the student."""
    own, size = teacher.preparation, wanted.teacher_size
    if own is None:
        if size is None:
            return None, None
        own = evaluation
    in_training = training.at(size or teacher.train_size or own.size)._replace(interpolation=own.interpolation)
    in_evaluation = own.at(size or own.size)
    if in_training == training and _show_the_same(in_evaluation, evaluation):
        return None, None
    return in_training, in_evaluation


def _show_the_same(first: Preparation, second: Preparation) -> bool:
    """Return whether two preparations differ at most in the colour of borders that they do not add."""
    return first == second or (first.mode != "border" and first._replace(fill=second.fill) == second)
