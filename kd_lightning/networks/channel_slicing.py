"""Networks whose layers have lost channels: how wide each is, and making another as narrow."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError


def tensor_shapes(network: nn.Module) -> dict[str, list[int]]:
    """The shape of each weight and buffer by its name, plain."""
    return {name: list(value.shape) for name, value in network.state_dict().items()}


def slice_to(network: nn.Module, wanted: Mapping[str, Sequence[int]]) -> nn.Module:
    """Cut weights and buffers to shapes, in place; which values remain is for a state dict to say.

    Args:
        network: As wide as the network was before it was pruned.
        wanted: What :func:`shapes` said of the pruned network.

    Raises:
        ValueError: If a shape is no part of what is there.

    Example:
        >>> small = slice_to(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), {"0.weight": [3, 4], "0.bias": [3],
        ...     "1.weight": [2, 3], "1.bias": [2]})
        >>> small(torch.rand(1, 4)).shape, small[0].out_features
        (torch.Size([1, 2]), 3)
    """
    kept: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        shape = wanted.get(name, value.shape)
        if not _is_part(shape, value.shape):
            raise UserError(
                f"{name!r} of {type(network).__name__} has the shape {tuple(value.shape)} and not {shape}; "
                "build the network that was pruned."
            )
        places = torch.arange(value.numel()).view(value.shape)
        kept[name] = places[tuple(slice(side) for side in shape)]
    return select(network, kept)


def _is_part(shape: Any, whole: Sequence[int]) -> bool:
    if not isinstance(shape, list | tuple) or len(shape) != len(whole):
        return False
    return all(isinstance(side, int) and 0 < side <= full for side, full in zip(shape, whole, strict=True))


def select(network: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """Keep some entries of weights and buffers, in place.

    Args:
        network: What is cut.
        kept: For each name of the state dict the entries, as places in the flattened tensor, in the new shape.
    """
    for prefix, module in network.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            places = kept.get(f"{prefix}.{name}" if prefix else name)
            if value is None or places is None or places.shape == value.shape:
                continue
            cut = select_entries(value.detach(), places)
            setattr(module, name, nn.Parameter(cut, value.requires_grad) if isinstance(value, nn.Parameter) else cut)
        _update_layer_sizes(module)
    network.sliced_shapes = tensor_shapes(network)  # type: ignore[assignment]  # a plain attribute, for checkpoints
    return network


def select_entries(values: Tensor, places: Tensor) -> Tensor:
    """Entries of a tensor by their places in it flattened, in the shape of the places, laid out in memory as it was."""
    cut = values.flatten()[places.flatten().to(values.device)].view(places.shape)
    last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(cut, memory_format=torch.channels_last).copy_(cut) if last else cut


def _update_layer_sizes(module: nn.Module) -> None:
    """Have a layer say how wide it is now."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd) and isinstance(weight, Tensor):
        depthwise = module.groups > 1 and weight.shape[1] == 1
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[0] if depthwise else weight.shape[1] * module.groups
        module.groups = weight.shape[0] if depthwise else module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
