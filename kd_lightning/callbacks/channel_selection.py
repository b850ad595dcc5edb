"""Selects the channels to remove from a network, on a copy of it, with torch-pruning."""

import warnings
from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning.errors import UserError, first_line
from kd_lightning.features import FeatureTap
from kd_lightning.networks.copying import copy_network
from kd_lightning.networks.output_layers import output_layers

Measure = Literal["macs", "parameters", "latency"]
Importance = Literal["magnitude", "bn_scale", "taylor"]
_STEPS = 100
_History = list[tuple[str, bool, list[int]]]
"""What a pruner has done: the layers, whether their outputs were removed, and the indices of the channels."""


class _Pruner(Protocol):
    def step(self) -> object: ...

    def pruning_history(self) -> _History: ...


def torch_pruning() -> ModuleType:
    """Import torch-pruning.

    Raises:
        UserError: If it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning as library
    except ImportError as error:
        raise UserError(
            "torch-pruning of the extra `prune` is not installed; run "
            '`pip install ".[prune]"` in a checkout of kd_lightning.'
        ) from error
    module: ModuleType = library
    return module


def cost(network: nn.Module, image: Tensor, measure: Measure) -> float:
    """Return the multiply-accumulates of one image, the number of weights, or the median seconds of 20 runs."""
    if measure != "latency":
        return float(torch_pruning().utils.count_ops_and_params(network, image)[measure == "parameters"])
    seconds = []
    with torch.no_grad():
        for _ in range(23):
            start = perf_counter()
            network(image)
            seconds.append(perf_counter() - start)
    return median(seconds[3:])


def channels_to_keep(
    network: nn.Module,
    image: Tensor,
    *,
    budget: float,
    measure: Measure,
    importance: Importance,
    layers: Sequence[str] = (),
    gradients: Mapping[str, Tensor] | None = None,
    round_to: int = 1,
) -> dict[str, Tensor]:
    """Select the entries of each weight and buffer that are kept when the least important channels are removed.

    Channels that depend on each other (residual sums, norms, the next layer's inputs) are removed together, until the
    network meets the budget.

    G. Fang et al.: DepGraph: Towards Any Structural Pruning, CVPR 2023, https://arxiv.org/abs/2301.12900

    Args:
        network: The network, which is not changed.
        image: An input of shape ``(1, channels, H, W)``.
        budget: The maximum cost of the pruned network, in the unit of ``measure``.
        measure: The cost; see :func:`cost`.
        importance: ``"magnitude"`` of weights, ``"bn_scale"`` (Liu 2017) or ``"taylor"`` (weight times gradient,
            Molchanov 2019).
        layers: Layers whose outputs keep their width, in addition to the classifier.
        gradients: The gradients of the weights by name, for ``"taylor"``.
        round_to: Divisor of the remaining widths, where possible.

    Returns:
        For each name of the state dict the indices into the flattened tensor, in the new shape.

    Raises:
        UserError: If the network cannot be traced, shuffles its channels, or exceeds the budget with one channel left
            in each layer.
    """
    _check_not_shuffled(network, image)
    small = _trainable_copy(network, gradients)
    image = image.cpu().float()
    before = cost(small, image, measure)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = _pruner(small, image, importance, layers, round_to)
            for _ in range(_STEPS):
                if cost(small, image, measure) <= budget:
                    break
                pruner.step()
        reached = cost(small, image, measure)
    except Exception as error:
        raise UserError(
            f"{type(network).__name__} cannot be pruned ({first_line(error)}); torch-pruning has to trace it, which "
            "parameter-free shortcuts and the like prevent."
        ) from error
    if reached > budget:
        read = " and the layers that losses read" if layers else ""
        raise UserError(
            f"{type(network).__name__} cannot be reduced to {budget / before:.0%} of its {measure}: with one channel "
            f"left in each layer{read} {reached / before:.0%} remain; keep more."
        )
    return _kept_indices(network, image, pruner.pruning_history())


class _ShuffleSearch(TorchDispatchMode):
    """Notes whether a map's channels are shuffled, or ``(B, C, H, W)`` is divided into ``(B, g, C / g, H, W)``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        regrouped = (
            isinstance(result, Tensor)
            and result.ndim == 5
            and isinstance(args[0], Tensor)
            and args[0].ndim == 4
            and result.shape[3:] == args[0].shape[2:]
        )
        self.found |= regrouped or "channel_shuffle" in str(func)
        return result


def _check_not_shuffled(network: nn.Module, image: Tensor) -> None:
    """Raise a ``UserError`` for a network whose channels change places, which torch-pruning follows without an end."""
    copied = copy_network(network).cpu().float().eval()
    with torch.no_grad(), _ShuffleSearch() as search:
        copied(image.cpu().float())
    if search.found:
        raise UserError(
            f"{type(network).__name__} cannot be pruned, since it shuffles its channels or divides them into groups "
            "that are mixed; prune a network without that, or quantize this one."
        )


def _trainable_copy(network: nn.Module, gradients: Mapping[str, Tensor] | None) -> nn.Module:
    """Return a float32 copy on the CPU whose weights have the given gradients."""
    copied = copy_network(network).cpu().float().eval().requires_grad_(True)
    for name, weight in copied.named_parameters():
        weight.grad = None if gradients is None else gradients[name].cpu().float().clone()
    return copied


def _pruner(network: nn.Module, image: Tensor, importance: Importance, layers: Sequence[str], round_to: int) -> _Pruner:
    """Return a pruner that removes about a hundredth of the channels of a network in each step."""
    library = torch_pruning()
    importances = {
        "magnitude": library.importance.GroupMagnitudeImportance,
        "bn_scale": library.importance.BNScaleImportance,
        "taylor": library.importance.GroupTaylorImportance,
    }
    pruner: _Pruner = library.pruner.BasePruner(
        network,
        image,
        importance=importances[importance](),
        global_pruning=True,
        pruning_ratio=0.99,
        max_pruning_ratio=0.99,
        iterative_steps=_STEPS,
        ignored_layers=_ignored_layers(network, image, layers),
        round_to=round_to,
    )
    return pruner


def _kept_indices(network: nn.Module, image: Tensor, history: _History) -> dict[str, Tensor]:
    """Return the indices of the kept entries: prune a copy whose entries are their own indices in the same way."""
    indexed = copy_network(network).cpu().double().eval()  # exact for integers
    indexed.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning().DependencyGraph().build_dependency(indexed, image.double())
        for value in indexed.state_dict(keep_vars=True).values():
            value.data = torch.arange(value.numel(), dtype=torch.float64).view(value.shape)
        graph.load_pruning_history(history)
    return {name: value.long() for name, value in indexed.state_dict().items()}


def _ignored_layers(network: nn.Module, image: Tensor, layers: Sequence[str]) -> list[nn.Module]:
    """Return what computes the logits, and the last layer with weights before each output that is read."""
    ignored = [network.get_submodule(name) for name in output_layers(network, image.shape[1:]) if name]
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    hooks += [network.get_submodule(name).register_forward_hook(lambda *_: ignored.extend(ran[-1:])) for name in layers]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return ignored


def same_features(network: nn.Module, pruned: nn.Module, image: Tensor, layers: Sequence[str]) -> bool:
    """Return whether the outputs of layers have the same shapes in both networks."""
    shapes = []
    with torch.no_grad():
        for each in (network, pruned):
            tap = FeatureTap(each, layers)
            shapes.append({name: value.shape for name, value in tap(image).features.items()})
            tap.remove()
    return shapes[0] == shapes[1]
