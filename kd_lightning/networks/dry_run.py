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
        UserError: If a lazy layer has not seen a batch yet.
    """
    lazy = [name for name, weight in network.named_parameters() if is_lazy(weight)]
    if lazy:
        raise UserError(
            f"{type(network).__name__} has weights that have no shape yet ({lazy[0]!r}); show it a batch first, or "
            "give its layers their sizes."
        )


def try_forward(module: nn.Module, forward: Callable[[], Result], who: str, images: Tensor) -> Result:
    """Return the result of a forward pass in eval mode and without gradient.

    Args:
        module: Module that contains the network.
        forward: Function that runs the network.
        who: Name of the network in the message.
        images: Input of the network, for the message.

    Raises:
        UserError: If the network cannot take the images.
    """
    try:
        with evaluating(module):
            return forward()
    except RuntimeError as error:
        raise UserError(
            f"{who} cannot take images of shape {tuple(images.shape[1:])} ({first_line(error)}); choose a network for "
            "such images."
        ) from error


def count_classes(network: nn.Module, logits: object, expected: int | None) -> int:
    """Return the number of classes of a network, from its output for two images.

    Args:
        network: The network.
        logits: Its output, which should be ``(2, C)``.
        expected: Number of classes of the data, if it is known.

    Raises:
        UserError: If the output has another shape, or C is not the expected number.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError(f"{type(network).__name__} must return logits (B, C), one row for each image.")
    if expected is not None and expected != logits.shape[1]:
        raise UserError(
            f"The network has {logits.shape[1]} classes but the data have {expected}; build it with "
            f"num_classes={expected}, or give it a new head with replace_head."
        )
    return logits.shape[1]


def to_input_dtype(images: Tensor, network: nn.Module) -> Tensor:
    """Return images in the type and on the device of a network's weights (``bf16-true`` has its own type)."""
    weight = next(network.parameters(), images)
    return images.to(weight.device, weight.dtype if weight.is_floating_point() else images.dtype)
