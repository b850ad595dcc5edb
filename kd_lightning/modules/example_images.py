"""Two images to try networks on before training."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from kd_lightning.data.loader_checks import check_repeatable
from kd_lightning.data.protocol import is_multi_label
from kd_lightning.data.read_batch import read_training_batch
from kd_lightning.errors import UserError
from kd_lightning.networks.dry_run import first_twice


def example_images(trainer: pl.Trainer, *, pairs: bool) -> Tensor | None:
    """Return two images of the shape of the training images, without advancing the loader.

    Args:
        trainer: A ``Trainer`` whose data module, if it has one, is set up.
        pairs: Whether training batches keep a source and a target apart.

    Returns:
        ``(2, channels, H, W)``: random for a data module with an ``image_shape``, otherwise from the first training
        batch; ``None`` if there is neither.

    Raises:
        UserError: If there is no training batch, or it cannot be read.
    """
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    shape = getattr(data, "image_shape", None) if getattr(data, "size_is_known", True) else None
    if shape is not None:
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    source = trainer.fit_loop._data_source
    if trainer.state.fn != "fit" or not source.is_defined():
        return None
    loaders = source.dataloader()
    check_repeatable(loaders, "training")
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed when it is iterated
        fetched = next(iter(combined), None)
    if fetched is None:
        raise UserError(
            "The training loader yields no batch; give it a data set that is not empty, and with drop_last one of "
            "at least batch_size images."
        )
    (images, *_), _ = read_training_batch(fetched[0], pairs=pairs, multi_label=is_multi_label(data))
    return first_twice(images)
