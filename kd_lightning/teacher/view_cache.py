"""Loads the view of an epoch into a cache; a network runs on each training image once a view."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor

from kd_lightning.data.batch import Batch, finished
from kd_lightning.data.protocol import ViewData, has_fixed_views
from kd_lightning.errors import UserError
from kd_lightning.files.progress import progress
from kd_lightning.teacher.output_cache import OutputCache


def load_view(cache: OutputCache, epoch: int, trainer: pl.Trainer, compute: Callable[[Batch], Tensor]) -> None:
    """Make view ``epoch % cache.views`` the current one; if it is missing, all ranks compute it together.

    Args:
        cache: Cache with a row for each image and view.
        epoch: Number of the epoch.
        trainer: Trainer whose data module has ``view_dataloader``.
        compute: Function from a batch to rows of the cache, ``(B, C)``.
    """
    if cache.shows(epoch):
        return
    view = epoch % cache.views
    missing = torch.tensor(view not in cache, device=trainer.strategy.root_device)
    if trainer.strategy.reduce(missing.float(), reduce_op="sum") > 0:
        rows = compute_view(cache, view, trainer, compute)
        if cache.folder is None or trainer.is_global_zero or trainer.local_rank == 0:
            cache.put(view, rows)
        trainer.strategy.barrier()
    cache.load(view, trainer.strategy.root_device)


def check_cacheable(data: object, what: str, argument: str) -> ViewData:
    """Return a data module as one whose training images repeat, so that outputs for them can be cached.

    Args:
        data: Data module, or ``None``.
        what: Outputs to cache, for the message.
        argument: Name of the argument that asks for the cache, for the message.

    Raises:
        UserError: If training images differ between epochs.
    """
    if has_fixed_views(data):
        return data
    raise UserError(
        f"{what} cannot be cached: each epoch has new views; set views=V on a data module of this package, or set "
        f"{argument}=False."
    )


@torch.no_grad()
def compute_view(cache: OutputCache, view: int, trainer: pl.Trainer, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Return the rows ``(N, C)`` of a view; each rank computes a part of them."""
    rows = torch.zeros(cache.shape, device=trainer.strategy.root_device)
    data: ViewData = trainer.datamodule  # type: ignore[attr-defined]
    title = f"Computing outputs for view {view + 1} of {cache.views}"
    with progress(title, data.views_in_batch * len(data.train_samples), visible=trainer.is_global_zero) as advance:
        for batch in data.view_dataloader(view):
            moved = trainer.strategy.batch_to_device(batch)  # as in training outside of the precision's context
            shown: Batch = finished(moved, data)
            with trainer.precision_plugin.forward_context():
                rows[shown.ids // cache.views] = compute(shown).float()
            advance(len(shown.ids) * trainer.world_size)
    total: Tensor = trainer.strategy.reduce(rows, reduce_op="sum")  # every row is zero on all ranks but one
    return total
