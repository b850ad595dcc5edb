"""Has the view of an epoch in a cache, asking a network about each training image once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kd_lightning.teacher.output_cache import OutputCache


def load_view(cache: OutputCache, epoch: int, trainer: Any, ask: Callable[[Tensor], Tensor]) -> bool:
    """Show the view of an epoch, which is made first if it is not there; the ranks share the work.

    Args:
        cache: Rows by image and view.
        epoch: Shows view ``epoch % cache.views``.
        trainer: Whose data module has ``view_dataloader``.
        ask: Images ``(B, channels, H, W)`` to rows of the cache.

    Returns:
        Whether another view than before is shown.
    """
    view = epoch % cache.views
    if view == cache.shown:
        return False
    missing = torch.tensor(view not in cache, device=trainer.strategy.root_device)
    if trainer.strategy.reduce(missing.float(), reduce_op="sum") > 0:
        rows = compute_view(cache, view, trainer, ask)
        if cache.folder is None or trainer.is_global_zero or trainer.local_rank == 0:
            cache.put(view, rows)
        trainer.strategy.barrier()
    cache.show(view, trainer.strategy.root_device)
    return True


def uncacheable_reason(data: Any) -> str | None:
    """Why training images are not the same again in a later epoch, and what to do; ``None`` if they are."""
    if getattr(data, "views", None) is None:
        return "each epoch shows new views; set views=V on a data module of this package"
    if data.mixes_images:
        return "mixup and CutMix make new images in each epoch; set both to 0"
    return None


@torch.no_grad()
def compute_view(cache: OutputCache, view: int, trainer: Any, ask: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the rows ``(N, C)`` of a view; each rank computes its share."""
    rows = torch.zeros(cache.shape, device=trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        for batch in trainer.datamodule.view_dataloader(view):
            images, _, ids = trainer.strategy.batch_to_device(batch)
            rows[ids // cache.views] = ask(images).float()
    return trainer.strategy.reduce(rows, reduce_op="sum")  # each row is another's zeros but for one rank
