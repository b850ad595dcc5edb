"""Random choices for the views of a batch, drawn on the host, so that nothing waits for the device."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.data.augmentation.colours import ColourPlan, draw_colours
from kd_lightning.data.augmentation.erasing import Erasing, draw_erasing
from kd_lightning.data.augmentation.mixing import Mixing, draw_mixing
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.labels import is_labelled


class ViewPlan(NamedTuple):
    """Changes to the images of a batch beside crops and flips.

    Attributes:
        samples: The samples whose views are made: the B of the batch, then the partners that some are mixed with; int64
            ``(R,)``.
        colours: Operations on colours.
        erasing: Boxes that are erased.
        mixing: Which rows of the batch are mixed, and how.
        partner_labels: Class indices of the partners, int64 ``(R - B,)``; of multi-label data ``(R - B, C)``.
    """

    samples: Tensor
    colours: ColourPlan | None = None
    erasing: Erasing | None = None
    mixing: Mixing | None = None
    partner_labels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ViewDrawer:
    """Draws a :class:`ViewPlan` from (seed, sample, view) alone.

    Args:
        augmentation: Settings without ``None``.
        size: Height and width of the images.
        seed: The data module's ``view_seed``.
        views: Number of fixed views, or ``None`` for new views in each epoch.
        labels: Labels of the stored set, int64 ``(N,)``, or ``(N, C)`` of several classes.
        candidates: The samples that others may be mixed with: labelled ones that are trained on, int64, sorted.
    """

    augmentation: Augmentation
    size: tuple[int, int]
    seed: int
    views: int | None
    labels: Tensor
    candidates: Tensor

    @property
    def draws_nothing(self) -> bool:
        """Return whether there is nothing to draw for any sample, as with crops and flips alone."""
        settings = self.augmentation
        drawn = settings.erasing or settings.mixup or settings.cutmix
        return not drawn and draw_colours(self.candidates[:0], augmentation=settings, seed=0, view=0) is None

    def view_of_epoch(self, epoch: int) -> int:
        """Return the view that an epoch shows, or -1 for images without augmentation."""
        return epoch if self.views is None or epoch < 0 else epoch % self.views

    def __call__(self, samples: Tensor, labels: Tensor, epoch: int) -> ViewPlan | None:
        """Return the choices for a batch of an epoch, ``None`` if there are none.

        Args:
            samples: int64 ``(B,)``.
            labels: Class indices ``(B,)``, or ``(B, C)`` of several classes; unlabelled rows, -1, are not mixed.
            epoch: Number of the epoch, -1 for no augmentation.
        """
        if epoch < 0:
            return None
        view, settings = self.view_of_epoch(epoch), self.augmentation
        mixing = draw_mixing(
            samples,
            candidates=self.candidates,
            labelled=is_labelled(labels),
            seed=self.seed,
            view=view,
            mixup=settings.mixup or 0.0,
            cutmix=settings.cutmix or 0.0,
        )
        rows = samples if mixing is None else torch.cat([samples, mixing.partners])
        colours = draw_colours(rows, augmentation=settings, seed=self.seed, view=view)
        erasing = None
        if settings.erasing:
            erasing = draw_erasing(rows, probability=settings.erasing, size=self.size, seed=self.seed, view=view)
        if colours is None and erasing is None and mixing is None:
            return None
        return ViewPlan(rows, colours, erasing, mixing, None if mixing is None else self.labels[mixing.partners])
