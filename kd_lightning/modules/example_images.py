"""Two images to try networks on before training."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kd_lightning.features import evaluating

Result = TypeVar("Result")


def example_images(trainer: Any) -> Tensor | None:
    """Two images of the shape that a trainer is about to show, without disturbing what it will show.

    Args:
        trainer: A ``Trainer`` whose data module, if it has one, is set up.

    Returns:
        ``(2, channels, H, W)``: of a data module that tells its ``image_shape``, else from the first training batch;
        ``None`` if neither is there.
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
        raise ValueError(
            "The training loader must yield (images, labels) with images (B, channels, H, W), got "
            f"{type(batch).__name__}."
        )
    return images[:1].float().expand(2, -1, -1, -1)


def refuse_lazy(network: nn.Module) -> None:
    """Make sure that all weights are there.

    Raises:
        ValueError: If a lazy layer has not seen a batch yet.
    """
    lazy = [name for name, weight in network.named_parameters() if is_lazy(weight)]
    if lazy:
        raise ValueError(
            f"{type(network).__name__} has weights that have no shape yet ({lazy[0]!r}); show it a batch first, or "
            "give its layers their sizes."
        )


def tried_out(module: nn.Module, forward: Callable[[], Result], who: str, images: Tensor) -> Result:
    """What a forward pass gives in eval mode and without gradient.

    Args:
        module: Holds what runs.
        forward: Runs it.
        who: Names it in the message.
        images: What it is run on, for the message.

    Raises:
        ValueError: If the network cannot take the images.
    """
    try:
        with evaluating(module):
            return forward()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"{who} cannot take images of shape {tuple(images.shape[1:])} ({reason}); choose a network for such images."
        ) from error
