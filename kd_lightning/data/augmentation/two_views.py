"""Two views of each training image in one batch: first all of one augmentation, then all of another."""

import torch

from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.batch import Batch
from kd_lightning.errors import UserError


def check_two_views(first: Augmentation, second: Augmentation) -> None:
    """Check that both augmentations can be applied to the same batch.

    Args:
        first: Settings of the first view, without ``None``.
        second: Settings of the second view, without ``None``.

    Raises:
        UserError: If one of them mixes images or cuts them on the host.
    """
    for name, settings in (("augmentation", first), ("second_view", second)):
        if settings.mixup or settings.cutmix:
            raise UserError(
                f"Two views of an image have the same label, but {name} mixes images and labels; set mixup and cutmix "
                "to 0, or second_view to null."
            )
        if settings.resized_crop:
            raise UserError(
                f"Two views are made of images of one size, but {name}.resized_crop cuts each image while it is read; "
                "set resized_crop to false in augmentation and in second_view, or second_view to null."
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
