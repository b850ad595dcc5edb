"""The sizes of images: in training, in evaluation and for the teacher; what is not given is taken from the networks."""

import math
from collections.abc import Mapping
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

    def check(self) -> None:
        """Raise an error if a value is outside its range."""
        for name in ("image_size", "eval_size", "teacher_size", "store_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"{name} must be >= 1, got {size}.")
        if self.eval_crop is not None and not 0 < self.eval_crop <= 1:
            raise UserError(f"eval_crop must be in (0, 1], got {self.eval_crop}.")
        if self.interpolation not in (None, *CROP_FILTERS):
            raise UserError(f"interpolation must be {' or '.join(CROP_FILTERS)}, got {self.interpolation!r}.")


class Sizes(NamedTuple):
    """Preparations of images for the networks.

    Attributes:
        training: Preparation of training images, as far as they are not cut at random.
        evaluation: Preparation of the others.
        teacher: Preparation for the teacher, ``None`` if it sees the same images as the trained network.
        store_size: Largest shorter side of the images that random crops are cut from.
    """

    training: Preparation
    evaluation: Preparation
    teacher: Preparation | None
    store_size: int


def choose_sizes(wanted: Wanted, known: Mapping[str, DataConfig]) -> tuple[Sizes | None, str]:
    """Return the sizes, and whose they are: what is given, else of the first network that knows it.

    Args:
        wanted: Sizes that the user asks for.
        known: The input that each network expects, by name; ``"the teacher"`` may see images of another size.

    Returns:
        ``None`` if no size is known.

    Raises:
        UserError: If a value is outside its range, or sizes do not go together.
    """
    wanted.check()
    origin = next((name for name, config in known.items() if config.preparation is not None), "")
    own = known[origin].preparation if origin else None
    if wanted.image_size is not None:
        own, origin = own or Preparation.of(wanted.image_size), "given"
    if own is None:
        unused = [name for name, value in wanted._asdict().items() if value is not None]
        if unused:
            raise UserError(f"{unused[0]} needs the size of the images; set image_size.")
        return None, ""
    training = _as_wanted(own, wanted, wanted.image_size or own.size)
    evaluation = _as_wanted(own, wanted, wanted.eval_size or training.size)
    teacher = _for_teacher(wanted, known.get("the teacher", DataConfig()).preparation, training, evaluation)
    largest = max(*training.size, *evaluation.size, *(teacher.size if teacher else (0,)))
    if wanted.store_size is not None and wanted.store_size < largest:
        raise UserError(f"store_size must be at least {largest}, the largest size, got {wanted.store_size}.")
    return Sizes(training, evaluation, teacher, wanted.store_size or math.ceil(_STORE * largest)), origin


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
    wanted: Wanted, own: Preparation | None, training: Preparation, evaluation: Preparation
) -> Preparation | None:
    """Return how images are prepared for the teacher, ``None`` if as for the trained network."""
    if own is None and wanted.teacher_size is None:
        return None
    size = own.size if own is not None and wanted.teacher_size is None else (wanted.teacher_size or 0,) * 2
    found = (evaluation if own is None else own).at((size[0], size[1]))
    return None if found.size == training.size == evaluation.size else found
