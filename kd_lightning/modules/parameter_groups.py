"""Parameter groups: which weights decay, and which layers learn more slowly."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

ParameterGroups = list[dict[str, Any]]
"""As torch's optimizers take them."""


def parameter_groups(
    parameters: Iterable[nn.Parameter], exempt: Collection[nn.Parameter] = frozenset()
) -> ParameterGroups:
    """Return two groups, so that weight decay leaves out norms and biases (fewer than two dimensions).

    Args:
        parameters: Weights; frozen ones are left out.
        exempt: Further weights without weight decay.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 3).parameters())]
        [1, 1]
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and parameter not in exempt else undecayed).append(parameter)
    groups: ParameterGroups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def undecayed_by_request(network: nn.Module) -> set[nn.Parameter]:
    """Return the weights for which a network itself asks for no weight decay.

    timm's networks name them in ``no_weight_decay()`` (position embeddings and class tokens, for example), and Swin's
    in ``no_weight_decay_keywords()``.

    Example:
        >>> import torch
        >>> class Tokens(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.position = nn.Parameter(torch.zeros(1, 4))
        ...     def no_weight_decay(self):
        ...         return {"position"}
        >>> len(undecayed_by_request(nn.Sequential(Tokens())))
        1
    """
    found = set()
    for module in network.modules():
        names = _asked(module, "no_weight_decay")
        keywords = _asked(module, "no_weight_decay_keywords")
        if names or keywords:
            for name, weight in module.named_parameters():
                if name in names or any(keyword in name for keyword in keywords):
                    found.add(weight)
    return found


def _asked(module: nn.Module, method: str) -> set[str]:
    function = getattr(module, method, None)
    return set(function()) if callable(function) else set()


def layerwise_decay_groups(network: nn.Module, layer_decay: float) -> ParameterGroups:
    """Return groups as :func:`parameter_groups` does, in which earlier parts of the network learn more slowly.

    Parts are the direct children of the network, in order of declaration; one that holds more than half of all layers
    (the blocks of a Vision Transformer, the features of a MobileNet) is divided into its own children. The last part
    with trainable weights has ``"lr_scale"`` 1, each one before it ``layer_decay`` times that of the next; weights
    outside of all parts have that of the first.

    Example:
        >>> groups = layerwise_decay_groups(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), 0.5)
        >>> [group["lr_scale"] for group in groups]
        [1.0, 1.0, 0.5, 0.5]
    """
    exempt = undecayed_by_request(network)
    parts = [part for part in _parts(network, _count_layers(network)) if _is_trained(part)]
    groups: ParameterGroups = []
    seen, scale = set[nn.Parameter](), 1.0
    for part in reversed(parts):
        new = [weight for weight in part.parameters() if weight not in seen]
        seen.update(new)
        groups += [{**group, "lr_scale": scale} for group in parameter_groups(new, exempt)]
        scale *= layer_decay
    outside = [weight for weight in network.parameters() if weight not in seen]
    return groups + [{**group, "lr_scale": scale / layer_decay} for group in parameter_groups(outside, exempt)]


def _parts(module: nn.Module, all_layers: int) -> Iterator[nn.Module]:
    for child in module.children():
        layers = _count_layers(child)
        if 2 * layers > all_layers and layers > 1:
            yield from _parts(child, all_layers)
        else:
            yield child


def _count_layers(module: nn.Module) -> int:
    """Return the number of layers that have weights of their own."""
    return sum(any(True for _ in layer.parameters(recurse=False)) for layer in module.modules())


def _is_trained(part: nn.Module) -> bool:
    return any(weight.requires_grad for weight in part.parameters())
