"""The defaults for the optimizer: which weights decay, and how the learning rate moves."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups, so that weight decay leaves out what has fewer than two dimensions: norms and biases.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 3).parameters())]
        [1, 1]
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def layerwise_decay_groups(network: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Groups as of :func:`parameter_groups`, in which each part of a network learns slower than the one after it.

    The last of its direct children has ``"lr_scale"`` 1, each before it ``layer_decay`` times that of the next; weights
    outside of children have that of the first.

    Example:
        >>> groups = layerwise_decay_groups(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), 0.5)
        >>> [group["lr_scale"] for group in groups]
        [1.0, 1.0, 0.5, 0.5]
    """
    parts = [part for part in network.children() if any(weight.requires_grad for weight in part.parameters())]
    groups, seen, scale = [], set[nn.Parameter](), 1.0
    for part in reversed(parts):
        new = [weight for weight in part.parameters() if weight not in seen]
        seen.update(new)
        groups += [{**group, "lr_scale": scale} for group in parameter_groups(new)]
        scale *= layer_decay
    own = [weight for weight in network.parameters() if weight not in seen]
    return groups + [{**group, "lr_scale": scale / layer_decay} for group in parameter_groups(own)]


def init_momentum_buffers(optimizer: Optimizer) -> None:
    """Before a step, give torch's fused SGD zeros where a weight has a gradient and no momentum yet.

    The step makes of them the gradient, as it would of nothing. By itself the fused kernel refuses a group in which
    some weights have a momentum and others, whose first gradient comes later, have none; and where the first step is
    left out (``found_inf``) it goes on with memory that nobody has written to.
    """
    groups = optimizer.param_groups if isinstance(optimizer, SGD) else []
    if len(optimizer.state) == sum(len(group["params"]) for group in groups):
        return
    for group in groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for weight in group["params"]:
                if weight.grad is not None and optimizer.state[weight].get("momentum_buffer") is None:
                    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight.grad)


def one_cycle(step: int, total_steps: float, rise: float = 0.3) -> float:
    """What the peak learning rate is multiplied by: a cosine from 1/25 up to 1, and one down to 4e-6.

    As ``torch.optim.lr_scheduler.OneCycleLR`` by default, but a pure function: a run that is resumed with more epochs
    follows the longer curve. Constant where the number of steps is unknown.

    L. N. Smith, N. Topin: Super-Convergence, 2018, https://arxiv.org/abs/1708.07120

    Args:
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run, or infinity.
        rise: The share of the steps during which the rate rises.

    Example:
        >>> [round(one_cycle(step, 10), 3) for step in (0, 2, 9)]
        [0.04, 1.0, 0.0]
    """
    if math.isinf(total_steps) or total_steps < 4:
        return 1.0
    top, end = max(rise * total_steps - 1, 1), total_steps - 1
    if step <= top:
        return _cosine(1 / 25, 1.0, step / top)
    return _cosine(1.0, 4e-6, min((step - top) / (end - top), 1.0))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
