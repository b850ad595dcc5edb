"""Reads the outputs of named layers from an unchanged network."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_lightning.errors import UserError
from kd_lightning.features.tokens import Features, Grid, find_grid


class Outputs(NamedTuple):
    """The outputs of a network for a batch.

    Attributes:
        logits: Output of the network, ``(B, C)`` for a classifier.
        features: Output of each tapped layer by its dotted name, for example ``(B, channels, H, W)``.
            :class:`FeatureTap` returns them as :class:`Features`, with the grids of tokens.

    Example:
        >>> outputs = Outputs(torch.zeros(2, 10), {"layer1": torch.zeros(2, 4, 8, 8)})
        >>> outputs.features["layer1"].shape
        torch.Size([2, 4, 8, 8])
    """

    logits: Tensor
    features: dict[str, Tensor] = {}  # noqa: RUF012 - never written to


class _Recorder:
    """A forward hook that keeps the output of one layer while its tap is reading.

    A callable object and not a closure, so that a network that carries hooks can be deep-copied: the copy's recorder
    is a copy as well, which no tap opens.
    """

    def __init__(self) -> None:
        self.reading = False
        self.output: object = None

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.reading:
            self.output = output


class FeatureTap:
    """Runs a network and returns its logits together with the outputs of named layers.

    Not an ``nn.Module``: the network's weights stay where they are, once. With no layers named no hook is installed.
    Of a layer that runs several times the last output is read. An in-place operation after a tapped layer would
    change that output; :meth:`check_not_overwritten` finds it. The grid of tokens follows from their number, the
    images' size and, where the network has it, timm's attribute ``num_prefix_tokens``, which any network may be given.

    Args:
        network: Any classifier. It is not changed apart from one forward hook for each named layer.
        layers: Dotted names as in ``network.named_modules()``, for example ``"layer2"`` or ``"layer3.0.conv1"``.
        role: Name of the network in messages, for example ``"teacher"``.

    Raises:
        UserError: If a name is not a layer of the network; the message lists the candidates with their shapes.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> logits, features = FeatureTap(resnet20(), ["layer2"])(torch.rand(4, 3, 32, 32))
        >>> features["layer2"].shape
        torch.Size([4, 32, 16, 16])
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = (), role: str | None = None) -> None:
        self.network = network
        plain = getattr(network, "_orig_mod", network)  # torch.compile wraps it and prefixes every name
        modules = dict(plain.named_modules())
        missing = [name for name in dict.fromkeys(layers) if not name or name not in modules]
        if missing:
            raise UserError(
                f"{_named(plain, role)} has no layer {', '.join(map(repr, missing))}; choose from{_candidates(plain)}."
            )
        self._recorders = {name: _Recorder() for name in dict.fromkeys(layers)}
        self._tapped = {name: modules[name] for name in self._recorders}
        self._channels_last: set[str] = set()
        self._grids: dict[tuple[int, int, int], Grid | None] = {}
        self._hooks = [self._tapped[name].register_forward_hook(hook) for name, hook in self._recorders.items()]
        weakref.finalize(self, _remove, self._hooks).atexit = False  # the network may outlive several taps

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the names of the tapped layers, each once."""
        return tuple(self._recorders)

    def __call__(self, images: Tensor) -> Outputs:
        """Run the network on ``(B, channels, H, W)`` images."""
        for recorder in self._recorders.values():
            recorder.reading, recorder.output = True, None
        try:
            logits = logits_of(self.network(images), self.network)
            features = {name: self._map(name, recorder.output) for name, recorder in self._recorders.items()}
            return Outputs(logits, Features(features, self._find_grids(features, images)))
        finally:
            for recorder in self._recorders.values():
                recorder.reading, recorder.output = False, None

    def check_not_overwritten(self, images: Tensor) -> None:
        """Run the network once and make sure that later operations do not overwrite the layers' outputs.

        Raises:
            UserError: If an in-place operation changes the output of a layer afterwards.
        """
        given: dict[str, Tensor] = {}

        def keep(name: str, output: object) -> None:
            given[name] = self._map(name, output).clone()

        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            for name, layer in self._tapped.items()
        ]
        try:
            with evaluating(self.network):
                features = self(images).features
        finally:
            _remove(hooks)
        for name, output in given.items():
            if not torch.equal(features[name], output):
                raise UserError(
                    f"What layer {name!r} gives is overwritten in place by what follows it (an in-place ReLU, say); "
                    "name the layer that follows, or the block that holds both."
                )

    def _map(self, name: str, output: object) -> Tensor:
        maps = _tensor(name, output)
        return maps.permute(0, 3, 1, 2) if name in self._channels_last else maps

    def _find_grids(self, features: dict[str, Tensor], images: Tensor) -> dict[str, Grid]:
        height, width = images.shape[-2:]
        found: dict[str, Grid] = {}
        for name, value in features.items():
            if value.dim() == 3:
                key = (value.shape[1], height, width)
                if key not in self._grids:
                    declared = getattr(self.network, "num_prefix_tokens", None)
                    self._grids[key] = find_grid(value.shape[1], image_size=(height, width), prefix=declared)
                if (grid := self._grids[key]) is not None:
                    found[name] = grid
        return found

    def find_channels_last(self, images: Tensor) -> None:
        """Run the network once to find layers whose maps are ``(B, H, W, C)``; they are read as ``(B, C, H, W)`` then.

        Transformers such as Swin have such maps. They are recognized by the layer that was computed last: a linear
        layer or a layer norm over the last dimension, and the same shape since.
        """
        last: list[tuple[int, ...]] = [()]
        self._channels_last = set()

        def record(module: nn.Module, args: object, output: object) -> None:
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d) and isinstance(output, Tensor):
                last[0] = tuple(output.shape) if _is_channels_last(module, output) else ()

        def compare(name: str, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                batch, height, width, channels = output.shape
                if last[0] in ((batch, height, width, channels), (batch, height * width, channels)):  # maps, or tokens
                    self._channels_last.add(name)

        hooks = [module.register_forward_hook(record) for module in self.network.modules()]
        hooks += [
            layer.register_forward_hook(lambda _, __, output, name=name: compare(name, output))
            for name, layer in self._tapped.items()
        ]
        try:
            with evaluating(self.network):
                self.network(images)
        finally:
            _remove(hooks)

    def remove(self) -> None:
        """Remove the hooks from the network."""
        _remove(self._hooks)


def layer_shapes(network: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the output shape of every layer that returns one tensor, in the order in which the layers finish.

    The network runs once in eval mode and without gradient, so that its batch norms do not move; its mode is restored.

    Args:
        network: Any network.
        images: Batch of images for it, ``(B, channels, H, W)``.

    Example:
        >>> layer_shapes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(2, 3, 8, 8))
        {'0': (2, 4, 6, 6), '1': (2, 4, 6, 6)}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in network.named_modules() if name}

    def record(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[names[module]] = tuple(output.shape)

    hooks = [module.register_forward_hook(record) for module in names]
    try:
        with evaluating(network):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to eval mode and no gradient while the context lasts, and restore the mode of each layer.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> with evaluating(network):
        ...     network.training, network(torch.zeros(1, 2)).requires_grad
        (False, False)
        >>> network.training
        True
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_channels_last(module: nn.Module, output: Tensor) -> bool:
    if isinstance(module, nn.LayerNorm):  # torchvision's LayerNorm2d is one, and has channels in dimension 1
        (*_, width) = module.normalized_shape
        return output.shape[-1] == width and output.shape[1] != width
    return isinstance(module, nn.Linear)


def _remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _named(network: nn.Module, role: str | None) -> str:
    return type(network).__name__ if role is None else f"The {role} ({type(network).__name__})"


def _candidates(network: nn.Module) -> str:
    """Return the layers with their shapes for an image of 32 or 224 pixels, or without if the network takes neither."""
    filters = [weight for weight in network.parameters() if weight.dim() == 4]
    for size in (32, 224):
        with suppress(Exception):  # a user's network may raise anything at an unexpected size
            shapes = layer_shapes(network, filters[0].new_zeros(2, filters[0].shape[1], size, size))
            listed = ", ".join(f"{name} {shape[1:]}" for name, shape in shapes.items())
            return f" (shapes for a {size}x{size} image): {listed}"
    return f": {', '.join(name for name, _ in network.named_modules() if name)}"


def logits_of(output: object, network: nn.Module) -> Tensor:
    """Return the logits in the output of a network: the output itself, or its field ``logits``.

    The latter is what torchvision's GoogLeNet and Inception return in train mode, beside auxiliary logits, and what
    Hugging Face's classifiers return. Of timm's networks with a distillation token and ``distilled_training`` set,
    which return the logits of two heads in train mode, it is the mean, as these networks return in eval mode.

    Raises:
        UserError: If the output is something else.

    Example:
        >>> logits_of(torch.zeros(2, 3), nn.Linear(2, 3)).shape
        torch.Size([2, 3])
    """
    if isinstance(output, tuple) and len(output) == 2 and getattr(network, "distilled_training", False):
        of_class, of_distillation = output
        output = (of_class + of_distillation) / 2
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{type(network).__name__} returns a {type(output).__name__} and not only its logits; wrap it in a network "
            "that does."
        )
    return logits


def _tensor(name: str, output: object) -> Tensor:
    if output is None:
        raise UserError(f"Layer {name!r} did not run in the network's forward; name a layer that does.")
    if not isinstance(output, Tensor):
        raise UserError(f"{name} returns a {type(output).__name__} and not one tensor; name a layer that returns one.")
    return output
