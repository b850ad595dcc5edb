"""The layers that compute a network's logits, found by what they do and not by where they are declared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from kd_lightning.features import evaluating

_SIZES = (32, 224, 28, 8, 299, 384)


def output_layers(network: nn.Module, image_shape: Sequence[int] | None = None) -> list[str]:
    """Return the names of the layers whose weight matrices or filters compute the logits.

    Usually one ``nn.Linear``; also a convolution before the last pooling, or two heads whose outputs are averaged.

    Args:
        network: A classifier, images ``(B, channels, H, W)`` to logits ``(B, C)``.
        image_shape: ``(channels, H, W)`` of its images; ``None`` to try usual sizes.

    Returns:
        Names as in ``named_modules()``, in that order; the last ``nn.Linear`` where the network cannot be traced by
        autograd (int8 networks, for example), or nothing where there is none.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> output_layers(resnet20())
        ['fc']
    """
    matrices = {name for name, weight in _weights_of_logits(network, image_shape) if weight.dim() > 1}
    owners = {_owner(name) for name in matrices}
    if not owners:
        return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name][-1:]
    return [name for name, _ in network.named_modules() if name in owners]


def output_weights(network: nn.Module, image_shape: Sequence[int] | None = None) -> list[str]:
    """Return the names of the weights that compute the logits: those of :func:`output_layers`, and of norms after them.

    Args:
        network: A classifier.
        image_shape: ``(channels, H, W)`` of its images; ``None`` to try usual sizes.
    """
    found = [name for name, _ in _weights_of_logits(network, image_shape)]
    if found:
        return found
    layers = output_layers(network, image_shape)
    return [name for name, _ in network.named_parameters() if _owner(name) in layers]


def _owner(name: str) -> str:
    """Return the layer of a weight, also of one that is parametrized (by weight normalization, for example)."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _weights_of_logits(network: nn.Module, image_shape: Sequence[int] | None) -> list[tuple[str, nn.Parameter]]:
    plain = getattr(network, "_orig_mod", network)  # torch.compile wraps it
    for shape in [tuple(image_shape)] if image_shape is not None else _usual_shapes(plain):
        with suppress(Exception), _training_all(plain), evaluating(plain), torch.enable_grad():
            weight = next(plain.parameters())
            images = torch.zeros(2, *shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
            logits = plain.forward(images)  # not a call, which may be compiled
            if isinstance(logits, Tensor) and logits.dim() == 2 and logits.grad_fn is not None:
                found = _closest_weights(logits, images)
                return [(name, weight) for name, weight in plain.named_parameters() if weight in found]
    return []


def _usual_shapes(network: nn.Module) -> list[tuple[int, ...]]:
    filters = (weight for weight in network.parameters() if weight.dim() == 4)
    first = next(filters, None)
    return [] if first is None else [(first.shape[1], size, size) for size in _SIZES]


@contextmanager
def _training_all(network: nn.Module) -> Iterator[None]:
    """Let autograd see frozen weights too."""
    frozen = [weight for weight in network.parameters() if not weight.requires_grad and weight.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _closest_weights(logits: Tensor, images: Tensor) -> set[Tensor]:
    """Walk from the logits towards the images; stop at operations that multiply by a weight matrix."""
    depends: dict[Node, bool] = {}
    found, seen, open_nodes = set[Tensor](), set[Node](), [cast("Node", logits.grad_fn)]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [child for child, _ in node.next_functions if child is not None]
        weights = {leaf for child in inputs if not _reaches(child, images, depends) for leaf in _leaves(child)}
        found |= weights
        if not any(weight.dim() > 1 for weight in weights):  # norms, biases and scales are passed
            open_nodes += [child for child in inputs if _reaches(child, images, depends)]
    return found


def _reaches(node: Node, images: Tensor, known: dict[Node, bool]) -> bool:
    """Return whether a node of the autograd graph depends on the images; without recursion, for deep networks."""
    path = [node]
    while path:
        top = path[-1]
        children = [child for child, _ in top.next_functions if child is not None]
        unknown = [child for child in children if child not in known]
        if top in known:
            path.pop()
        elif unknown:
            path += unknown
        else:
            known[top] = getattr(top, "variable", None) is images or any(known[child] for child in children)
    return known[node]


def _leaves(node: Node) -> Iterator[Tensor]:
    weight = getattr(node, "variable", None)
    if isinstance(weight, Tensor):
        yield weight
    for child, _ in node.next_functions:
        if child is not None:
            yield from _leaves(child)
