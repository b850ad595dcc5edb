"""Which channels of a network go, found on a copy of it by torch-pruning."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import FeatureTap
from kd_lightning.networks.head import head_of

Measure = Literal["macs", "parameters", "latency"]
Importance = Literal["magnitude", "bn_scale", "taylor"]
_STEPS = 100


def torch_pruning() -> Any:
    """The library.

    Raises:
        ValueError: If it is not installed.
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
    return library


def cost(network: nn.Module, image: Tensor, measure: Measure) -> float:
    """Multiply-accumulates for one image, weights, or the median seconds of 20 runs on it."""
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
    budget: float,
    measure: Measure,
    importance: Importance,
    layers: Sequence[str] = (),
    gradients: Mapping[str, Tensor] | None = None,
    round_to: int = 1,
) -> dict[str, Tensor]:
    """The entries of each weight and buffer that remain where the least important channels go until a budget is met.

    Groups of channels that depend on each other (residual sums, norms, the next layer's inputs) go together.

    G. Fang et al.: DepGraph: Towards Any Structural Pruning, CVPR 2023, https://arxiv.org/abs/2301.12900

    Args:
        network: Is not changed.
        image: ``(1, channels, H, W)``.
        budget: Most that the network may cost, in the unit of the measure.
        measure: See :func:`cost`.
        importance: ``"magnitude"`` of weights, ``"bn_scale"`` (Liu 2017) or ``"taylor"`` (weight times gradient,
            Molchanov 2019).
        layers: Whose outputs stay as wide as they are, besides the classifier's.
        gradients: Of the weights by name, for ``"taylor"``.
        round_to: Widths are multiples of it where that is possible.

    Returns:
        For each name of the state dict the places in the flattened tensor, in the new shape.

    Raises:
        ValueError: If the network cannot be traced, or cannot become so cheap with a channel left in each layer.
    """
    library = torch_pruning()
    small = copy.deepcopy(network).cpu().float().eval().requires_grad_(True)
    image = image.cpu().float()
    for name, weight in small.named_parameters():
        weight.grad = None if gradients is None else gradients[name].cpu().float().clone()
    by = {
        "magnitude": library.importance.GroupMagnitudeImportance,
        "bn_scale": library.importance.BNScaleImportance,
        "taylor": library.importance.GroupTaylorImportance,
    }[importance]()
    before = cost(small, image, measure)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = library.pruner.BasePruner(
                small,
                image,
                importance=by,
                global_pruning=True,
                pruning_ratio=0.99,
                max_pruning_ratio=0.99,
                iterative_steps=_STEPS,
                ignored_layers=_untouched(small, image, layers),
                round_to=round_to,
            )
            for _ in range(_STEPS):
                if cost(small, image, measure) <= budget:
                    break
                pruner.step()
        reached = cost(small, image, measure)
    except Exception as error:
        raise UserError(
            f"{type(network).__name__} cannot be pruned ({(str(error).splitlines() or [type(error).__name__])[0]}); "
            "torch-pruning has to trace it, which parameter-free shortcuts and the like prevent."
        ) from error
    if reached > budget:
        raise UserError(
            f"{type(network).__name__} cannot shrink to {budget / before:.0%} of its {measure}: with a channel left in "
            f"each layer{' and the layers that are read' if layers else ''} {reached / before:.0%} remain; keep more."
        )
    return _places(network, image, pruner.pruning_history())


def _places(network: nn.Module, image: Tensor, history: Any) -> dict[str, Tensor]:
    """Where the entries of the pruned network lay: those of a copy that holds its own places, pruned alike."""
    tagged = copy.deepcopy(network).cpu().double().eval()  # exact for whole numbers
    tagged.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning().DependencyGraph().build_dependency(tagged, image.double())
        for value in tagged.state_dict(keep_vars=True).values():
            value.data = torch.arange(value.numel(), dtype=torch.float64).view(value.shape)
        graph.load_pruning_history(history)
    return {name: value.long() for name, value in tagged.state_dict().items()}


def _untouched(network: nn.Module, image: Tensor, layers: Sequence[str]) -> list[nn.Module]:
    """The classifier, and of each layer that is read the last weighted layer that made its output."""
    head = head_of(network)
    spared = [] if head is None else [network.get_submodule(head[0])]
    ran: list[nn.Module] = []
    weighted = (nn.Conv2d, nn.Linear)
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for module in network.modules()
        if isinstance(module, weighted)
    ]
    hooks += [network.get_submodule(name).register_forward_hook(lambda *_: spared.extend(ran[-1:])) for name in layers]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return spared


def same_features(network: nn.Module, pruned: nn.Module, image: Tensor, layers: Sequence[str]) -> bool:
    """Whether layers of both say something of the same shape."""
    said = []
    with torch.no_grad():
        for each in (network, pruned):
            tap = FeatureTap(each, layers)
            said.append({name: value.shape for name, value in tap(image).features.items()})
            tap.remove()
    return said[0] == said[1]
