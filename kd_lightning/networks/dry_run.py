"""Trial runs of a network before training."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kd_lightning.errors import UserError, first_line
from kd_lightning.features import evaluating

Result = TypeVar("Result")


def check_initialized(network: nn.Module) -> None:
    """Make sure that all weights are there.

    Raises:
        ValueError: If a lazy layer has not seen a batch yet.
    """
    lazy = [name for name, weight in network.named_parameters() if is_lazy(weight)]
    if lazy:
        raise UserError(
            f"{type(network).__name__} has weights that have no shape yet ({lazy[0]!r}); show it a batch first, or "
            "give its layers their sizes."
        )


def try_forward(module: nn.Module, forward: Callable[[], Result], who: str, images: Tensor) -> Result:
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
        raise UserError(
            f"{who} cannot take images of shape {tuple(images.shape[1:])} ({first_line(error)}); choose a network for "
            "such images."
        ) from error
