"""Two views of each training image in one batch: first all of one augmentation, then all of another."""

from dataclasses import replace
from typing import NamedTuple

import torch

from kd_lightning.data.augmentation.resized_crop import ResizedCrop
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.augmentation.view_plan import ViewDrawer
from kd_lightning.data.batch import Batch
from kd_lightning.errors import UserError


class SecondView(NamedTuple):
    """The second view of each training image in a batch.

    Attributes:
        draw: Draws the changes beside crops and flips.
        crop: Cuts images on the host, where the first view is cut there too.
    """

    draw: ViewDrawer
    crop: ResizedCrop | None = None


def check_two_views(first: Augmentation, second: Augmentation) -> None:
    """Check that both augmentations can be applied to the same batch.

    Args:
        first: Settings of the first view, without ``None``.
        second: Settings of the second view, without ``None``.

    Raises:
        UserError: If one of them mixes images, or only one cuts them on the host.
    """
    for name, settings in (("augmentation", first), ("second_view", second)):
        if settings.mixup or settings.cutmix:
            raise UserError(
                f"Two views of an image have the same label, but {name} mixes images and labels; set mixup and cutmix "
                "to 0, or second_view to null."
            )
    if bool(first.resized_crop) != bool(second.resized_crop):
        raise UserError(
            "Two views are cut out of the same images, but one of augmentation and second_view has resized_crop and "
            "the other does not; set it in both or in neither."
        )


def second_crop(first: ResizedCrop, settings: Augmentation, seed: int) -> ResizedCrop:
    """Return the cut of second views, at the sizes of the first ones.

    Args:
        first: The cut of the first views.
        settings: Settings of the second views, without ``None``, with random resized crops.
        seed: Seed of the second views.
    """
    assert settings.crop_scale is not None
    assert settings.crop_ratio is not None
    return replace(
        first,
        scale=settings.crop_scale,
        ratio=settings.crop_ratio,
        flip=bool(settings.flip),
        vertical_flip=bool(settings.vertical_flip),
        seed=seed,
    )


def second_seed(view_seed: int) -> int:
    """Return the seed of second views, so that they are not drawn as the first ones.

    Example:
        >>> second_seed(0) == second_seed(0) != second_seed(1)
        True
    """
    return (view_seed + 0x5851F42D4C957F2D) % 2**62


def join_views(first: Batch, second: Batch) -> Batch:
    """Return both views of a batch as rows of one: all first views, then all second ones.

    Args:
        first: Batch of B rows.
        second: The same samples in the same order.
    """
    pair = first.teacher_images, second.teacher_images
    teacher_images = None if pair[0] is None or pair[1] is None else torch.cat([pair[0], pair[1]])
    return Batch(
        torch.cat([first.images, second.images]),
        torch.cat([first.labels, second.labels]),
        torch.cat([first.ids, second.ids]),
        teacher_images,
    )
