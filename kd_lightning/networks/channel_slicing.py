"""Networks with fewer channels: selects entries of their weights, or slices them to saved shapes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError

_ATTRIBUTE = "sliced_shapes"


def tensor_shapes(network: nn.Module) -> dict[str, list[int]]:
    """Return the shape of each weight and buffer by its name, as plain data."""
    return {name: list(value.shape) for name, value in network.state_dict().items()}


def slice_to(network: nn.Module, wanted: Mapping[str, Sequence[int]]) -> nn.Module:
    """Slice weights and buffers to shapes, in place; their values must be loaded from a state dict afterwards.

    Args:
        network: Network with the widths from before pruning.
        wanted: Result of :func:`tensor_shapes` for the pruned network.

    Raises:
        UserError: If a tensor is smaller than its wanted shape.

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
        indices = torch.arange(value.numel()).view(value.shape)
        kept[name] = indices[tuple(slice(side) for side in shape)]
    return select(network, kept)


def _is_part(shape: object, whole: Sequence[int]) -> bool:
    if not isinstance(shape, list | tuple) or len(shape) != len(whole):
        return False
    return all(isinstance(side, int) and 0 < side <= full for side, full in zip(shape, whole, strict=True))


def select(network: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """Keep only some entries of weights and buffers, in place.

    Args:
        network: Network to change.
        kept: Indices into each flattened tensor by its name in the state dict, in the new shape.

    Raises:
        UserError: If two layers share a weight of which they would keep different entries.
    """
    _check_shared(network, kept)
    replaced: dict[Tensor, Tensor] = {}  # a weight that two layers share stays one weight
    for prefix, module in network.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            indices = kept.get(f"{prefix}.{name}" if prefix else name)
            if value is None or indices is None or indices.shape == value.shape:
                continue
            if value not in replaced:
                chosen = select_entries(value.detach(), indices)
                is_weight = isinstance(value, nn.Parameter)
                replaced[value] = nn.Parameter(chosen, value.requires_grad) if is_weight else chosen
            setattr(module, name, replaced[value])
        _update_layer_sizes(module)
    setattr(network, _ATTRIBUTE, tensor_shapes(network))
    return network


def _check_shared(network: nn.Module, kept: Mapping[str, Tensor]) -> None:
    first: dict[nn.Parameter, str] = {}
    for name, weight in network.named_parameters(remove_duplicate=False):
        other = first.setdefault(weight, name)
        if name in kept and other in kept and not torch.equal(kept[name], kept[other]):
            raise UserError(
                f"{other!r} and {name!r} of {type(network).__name__} are one weight and would keep different channels; "
                "use a network without shared weights."
            )


def sliced_shapes(network: nn.Module) -> dict[str, list[int]] | None:
    """Return the shapes of a sliced network's weights and buffers for its checkpoint, or ``None`` if it was not sliced.

    They are the plain attribute ``network.sliced_shapes``, so that copies keep them.
    """
    shapes: dict[str, list[int]] | None = getattr(network, _ATTRIBUTE, None)
    return shapes


def select_entries(values: Tensor, indices: Tensor) -> Tensor:
    """Return entries of a tensor by their indices into the flattened tensor, in the tensor's memory format."""
    chosen = values.flatten()[indices.flatten().to(values.device)].view(indices.shape)
    last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(chosen, memory_format=torch.channels_last).copy_(chosen) if last else chosen


def _update_layer_sizes(module: nn.Module) -> None:
    """Update the attributes in which a layer keeps its sizes."""
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
