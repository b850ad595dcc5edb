"""Trial runs of a network before training."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
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


def check_precision(network: nn.Module, precision: str) -> None:
    """Make sure that a network to train has float32 weights, unless the Trainer converts them (``"bf16-true"``).

    Args:
        network: The network.
        precision: The Trainer's precision, for example ``"bf16-mixed"``.

    Raises:
        UserError: If some weights have another type.
    """
    types = {weight.dtype for weight in network.parameters() if weight.is_floating_point()}
    if types - {torch.float32} and (precision.endswith("-mixed") or precision == "32-true"):
        raise UserError(
            f"The weights of {type(network).__name__} are {_listed(types)} and the Trainer's precision is {precision}; "
            "convert the network with network.float(), or set another precision."
        )


def first_twice(images: Tensor) -> Tensor:
    """Return the first image of a batch ``(B, channels, H, W)`` twice, as a copy in float32, to try a network on.

    Raises:
        UserError: If the batch is empty.
    """
    if not len(images):
        raise UserError("The first batch does not contain any image; leave empty batches out of the loader.")
    return images[:1].float().repeat(2, 1, 1, 1)


def try_forward(
    module: nn.Module, forward: Callable[[], Result], who: str, images: Tensor, network: nn.Module | None = None
) -> Result:
    """Return the result of a forward pass in eval mode and without gradient.

    Args:
        module: Module that contains the network.
        forward: Function that runs the network.
        who: Name of the network in the message.
        images: Input of the network, for the message.
        network: The network, if it is not ``module``.

    Raises:
        UserError: If the network fails; the message says with what.
    """
    try:
        with evaluating(module):
            return forward()
    except UserError:
        raise
    except Exception as error:  # a user's network may raise anything
        kind = str(images.dtype).removeprefix("torch.")
        raise UserError(
            f"{who} fails for {kind} images of shape {tuple(images.shape[1:])} ({first_line(error)}); "
            f"{_advice(network or module, images)}."
        ) from error


def _advice(network: nn.Module, images: Tensor) -> str:
    types = {weight.dtype for weight in network.parameters() if weight.is_floating_point()}
    devices = {weight.device for weight in network.parameters()} | {images.device}
    if len(devices) > 1:
        return f"its weights are on {_listed(devices)}, put all of them on one device"
    if types - {images.dtype}:
        return f"its weights are {_listed(types)}, convert all of them with network.float()"
    return "compare the number of channels and the size with what the network is for, and its forward with the reason"


def _listed(values: Iterable[object]) -> str:
    return " and ".join(sorted(str(value).removeprefix("torch.") for value in values))


def returns_probabilities(logits: Tensor) -> bool:
    """Return whether the rows of logits ``(B, C)`` are probabilities, as after a softmax.

    Example:
        >>> logits = torch.randn(4, 3)
        >>> returns_probabilities(logits), returns_probabilities(logits.softmax(1))
        (False, True)
    """
    return bool((logits >= 0).all()) and bool(((logits.float().sum(1) - 1).abs() < 0.02).all())


def count_classes(network: nn.Module, logits: object, expected: int | None) -> int:
    """Return the number of classes of a network, from its output for two images.

    Args:
        network: The network.
        logits: Its output, which should be ``(2, C)``.
        expected: Number of classes of the data, if it is known.

    Raises:
        UserError: If the output has another shape, C is not the expected number, or there is only one class.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = f" {tuple(logits.shape)} for 2 images" if isinstance(logits, Tensor) else ""
        raise UserError(
            f"{type(network).__name__} must return logits (B, C), one row for each image, but returns a "
            f"{type(logits).__name__}{shape}; wrap it in a network that does."
        )
    if expected is not None and expected != logits.shape[1]:
        raise UserError(
            f"The network has {logits.shape[1]} classes but the data have {expected}; build it with "
            f"num_classes={expected}, or give it a new head with replace_head."
        )
    if logits.shape[1] == 1:
        raise UserError(
            f"{type(network).__name__} returns one logit for each image, of which the cross-entropy is always 0; build "
            "it with a logit for each class, two for two classes."
        )
    return logits.shape[1]


def describe_probabilities(who: str) -> str:
    """Return a warning about a network whose outputs are probabilities."""
    return f"{who} returns probabilities and not logits; remove its softmax, because losses apply one themselves."


def describe_output(network: nn.Module, logits: Tensor, *, trains: bool) -> list[str]:
    """Return warnings about the output of a network to train or to evaluate.

    Args:
        network: The network.
        logits: Its output.
        trains: Whether it is trained.
    """
    name = type(network).__name__
    warnings = [describe_probabilities(f"The network {name}")] if returns_probabilities(logits) else []
    if trains and getattr(network, "aux_logits", False):
        warnings.append(f"{name} has auxiliary classifiers, which no loss trains; build it with aux_logits=False.")
    return warnings


def to_input_dtype(images: Tensor, network: nn.Module) -> Tensor:
    """Return images in the type and on the device of a network's weights (``bf16-true`` has its own type)."""
    weight = next(network.parameters(), images)
    return images.to(weight.device, input_dtype(network, default=images.dtype))


def input_dtype(network: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """Return the type of a network's first real weight, or a default where it has none (int8 networks)."""
    return next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), default)
