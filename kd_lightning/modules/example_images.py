"""Two images to try networks on before training."""

from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import UserError


def example_images(trainer: Any) -> Tensor | None:
    """Return two images of the shape of the training images, without advancing the loader.

    Args:
        trainer: A ``Trainer`` whose data module, if it has one, is set up.

    Returns:
        ``(2, channels, H, W)``: random for a data module with an ``image_shape``, otherwise from the first training
        batch; ``None`` if there is neither.
    """
    shape = getattr(trainer.datamodule, "image_shape", None)
    if shape is not None:
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    source = trainer.fit_loop._data_source
    if trainer.state.fn != "fit" or not source.is_defined():
        return None
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed when it is iterated
        batch = next(iter(source.dataloader()), None)
    images = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise UserError(
            "The training loader must yield (images, labels) with images (B, channels, H, W), got "
            f"{type(batch).__name__}."
        )
    return images[:1].float().expand(2, -1, -1, -1)
