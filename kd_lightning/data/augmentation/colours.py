"""Operations on the pixels of a whole batch on the device: TrivialAugment, RandAugment, jitter, grey, blur.

torchvision's kernels for tensors define the pixels. Which image gets which operation is drawn on the host, and images
with the same operation and the same strength share one call.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from kd_lightning.data.augmentation.crops import random_bits, uniform
from kd_lightning.data.augmentation.full_float32 import full_float32
from kd_lightning.data.augmentation.pinned_constants import PinnedConstants
from kd_lightning.data.augmentation.settings import PRESETS, Augmentation, as_settings
from kd_lightning.errors import UserError

DIFFER_BETWEEN_DEVICES = (
    "trivial_augment",
    "rand_augment",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "blur",
)
"""Settings of operations that may differ by one grey level between kinds of devices."""

_ON_COLOURS = ("saturation", "hue", "grey")
_ON_LEVELS = ("trivial_augment", "rand_augment", "brightness", "contrast")

Operation = tuple[str, float]
"""The name of an operation and its strength, as in torchvision; 0 where it has none."""


class Call(NamedTuple):
    """An operation on consecutive rows of a stage."""

    name: str
    strength: float
    start: int
    end: int


class Stages:
    """The calls of each stage. Kept apart from tensors, so that no transfer to a device walks through them."""

    def __init__(self, calls: list[list[Call]]) -> None:
        self.calls = calls


class ColourPlan(NamedTuple):
    """Operations on the pixels of a batch.

    Attributes:
        orders: int64 ``(stages + 1, R)``. Before each stage the rows are put into its order, in which equal operations
            follow each other, and at last back into that of the batch.
        stages: The calls of each stage.
    """

    orders: Tensor
    stages: Stages


def check_channels(given: Augmentation | Mapping[str, Any], settings: Augmentation, channels: int) -> None:
    """Check that operations on colours are on for images that have them.

    On grey images those of a preset do nothing, as in torchvision, but what is asked for by its name is refused.

    Args:
        given: The user's settings, or the plain data that a checkpoint holds of them.
        settings: The same without ``None``.
        channels: Number of channels of the images.

    Raises:
        UserError: If an operation is on that images of so many channels cannot have.
    """
    if channels == 3:
        return
    if channels == 1:
        chosen = as_settings(given)
        preset, wanted, there = PRESETS.get(chosen.preset or "", {}), "three channels", "one"
        on = [name for name in _ON_COLOURS if getattr(chosen, name) not in (None, 0, preset.get(name))]
    else:
        wanted, there = "one or three channels", str(channels)
        on = [name for name in (*_ON_LEVELS, *_ON_COLOURS) if getattr(settings, name)]
    if on:
        raise UserError(
            f"augmentation.{on[0]} is for images of {wanted}, but mean and std are given for {there}; switch it off."
        )


def draw_colours(samples: Tensor, *, augmentation: Augmentation, seed: int, view: int) -> ColourPlan | None:
    """Draw the operations on each image, on the host; ``None`` if there are none.

    TrivialAugment (S. Müller, F. Hutter, ICCV 2021, https://arxiv.org/abs/2103.10158) or RandAugment (E. Cubuk et al.,
    NeurIPS 2020, https://arxiv.org/abs/1909.13719), then brightness, contrast, saturation and hue in this order, then
    grey and blur. Factors of brightness, contrast, saturation and hue are drawn from 16 values in equal steps, so that
    images share calls.

    Args:
        samples: int64 ``(R,)``.
        augmentation: Settings without ``None``.
        seed: The data module's ``view_seed``.
        view: Number of the view, from 0.
    """
    stages = list(_draw_stages(samples, augmentation, seed=seed, epoch=view))
    return plan_calls(stages, len(samples)) if stages else None


def plan_calls(stages: list[list[Operation | None]], count: int) -> ColourPlan:
    """Return the calls for operations that are given for each stage and row.

    Args:
        stages: The operation of each row, ``None`` where there is none.
        count: Number of rows, R.
    """
    layout = list(range(count))
    orders, calls = [], []
    for operations in stages:
        groups: dict[Operation, list[int]] = defaultdict(list)
        rest: list[int] = []
        for place, row in enumerate(layout):
            operation = operations[row]
            (rest if operation is None else groups[operation]).append(place)
        order: list[int] = []
        stage: list[Call] = []
        for (name, strength), places in groups.items():
            stage.append(Call(name, strength, len(order), len(order) + len(places)))
            order += places
        order += rest
        layout = [layout[place] for place in order]
        orders.append(order)
        calls.append(stage)
    back = [0] * count
    for place, row in enumerate(layout):
        back[row] = place
    return ColourPlan(torch.tensor([*orders, back]), Stages(calls))


def apply_colours(pixels: Tensor, plan: ColourPlan, *, scale: float = 1.0) -> Tensor:
    """Return images after the operations of a plan.

    Args:
        pixels: uint8 ``(R, 1 or 3, H, W)``.
        plan: From :func:`draw_colours`.
        scale: Factor of shifts in pixels and of the blur, for the same views at another size.
    """
    *orders, back = plan.orders.unbind()
    device = pixels.device
    at_once = max(1, _CPU_VALUES // pixels[0].numel()) if device.type == "cpu" else len(pixels)
    with full_float32(device), PinnedConstants() if device.type == "cuda" else nullcontext():
        for order, calls in zip(orders, plan.stages.calls, strict=True):
            pixels = pixels.index_select(0, order)
            for name, strength, start, end in calls:
                for part in pixels[start:end].split(at_once):
                    part.copy_(_OPERATIONS[name](part, strength, scale))
    return pixels.index_select(0, back)


# --- drawing

_CPU_VALUES = 2**18
"""Values in a call on a CPU, where more do not fit into its caches: sharpness takes three times as long for 2^22."""
_BINS = 31
_STEPS = 16
_SIGMAS = tuple(0.1 * 20 ** (step / 7) for step in range(8))  # 0.1 to 2 pixels in equal ratios


class _Strengths(NamedTuple):
    """The strengths of an operation by bin, and whether their sign is random."""

    by_bin: tuple[float, ...]
    signed: bool


def _space(shear: float, shift: float, angle: float, factor: float, bits: int, relative: bool) -> dict[str, _Strengths]:
    """Return torchvision's strengths of each operation, from the largest of each kind."""

    def rising(largest: float) -> _Strengths:
        return _Strengths(tuple(torch.linspace(0.0, largest, _BINS).tolist()), signed=True)

    posterize = (8 - (torch.arange(_BINS) / ((_BINS - 1) / bits))).round().int().tolist()
    shifts = {f"{'relative ' if relative else ''}translate {axis}": rising(shift) for axis in "xy"}
    return {
        "identity": _NONE,
        "shear x": rising(shear),
        "shear y": rising(shear),
        **shifts,
        "rotate": rising(angle),
        "brightness": rising(factor),
        "saturation": rising(factor),
        "contrast": rising(factor),
        "sharpness": rising(factor),
        "posterize": _Strengths(tuple(map(float, posterize)), signed=False),
        "solarize": _Strengths(tuple(torch.linspace(1.0, 0.0, _BINS).tolist()), signed=False),
        "autocontrast": _NONE,
        "equalize": _NONE,
    }


_NONE = _Strengths((0.0,) * _BINS, signed=False)
_TRIVIAL = _space(shear=0.99, shift=32.0, angle=135.0, factor=0.99, bits=6, relative=False)
_RAND = _space(shear=0.3, shift=150.0 / 331.0, angle=30.0, factor=0.9, bits=4, relative=True)
_FACTORS = {"brightness", "saturation", "contrast", "sharpness"}


def _draw_stages(samples: Tensor, settings: Augmentation, *, seed: int, epoch: int) -> Iterator[list[Operation | None]]:
    def draw(stream: int) -> Tensor:
        return random_bits(samples, seed=seed, epoch=epoch, stream=200 + stream)

    if settings.trivial_augment:
        yield _from_space(_TRIVIAL, draw(0), (draw(1) % _BINS).tolist())
    for number in range(settings.rand_augment or 0):
        yield _from_space(_RAND, draw(50 + number), [settings.magnitude or 0] * len(samples))
    for stream, name in enumerate(("brightness", "contrast", "saturation", "hue"), 10):
        if largest := getattr(settings, name):
            low, high = (-largest, largest) if name == "hue" else (max(0.0, 1 - largest), 1 + largest)
            factors = [low + (step + 0.5) / _STEPS * (high - low) for step in range(_STEPS)]
            yield [(name, factors[step]) for step in (draw(stream) % _STEPS).tolist()]
    for stream, name, strengths in ((20, "grey", (0.0,)), (22, "blur", _SIGMAS)):
        if probability := getattr(settings, name):
            chosen = uniform(samples, seed=seed, epoch=epoch, stream=200 + stream) < probability
            which = (draw(stream + 1) % len(strengths)).tolist()
            yield [(name, strengths[one]) if yes else None for yes, one in zip(chosen.tolist(), which, strict=True)]


def _from_space(space: dict[str, _Strengths], bits: Tensor, bins: list[int]) -> list[Operation | None]:
    """Return an operation for each sample, from random bits for its kind and its sign, and the bin of its strength."""
    names, operations = list(space), []
    signs = ((bits >> 40) & 1).tolist()
    for kind, sign, which in zip(((bits & 0xFFFFFFFFF) % len(names)).tolist(), signs, bins, strict=True):
        name = names[kind]
        strength = space[name].by_bin[which]
        strength = -strength if space[name].signed and sign else strength
        operations.append(None if name == "identity" else (name, 1 + strength if name in _FACTORS else strength))
    return operations


# --- torchvision's kernels, each a function of (images, strength, scale)


def _affine(images: Tensor, *, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Tensor:
    """Shift by whole pixels about the centre, or shear about the first pixel, as torchvision's policies do."""
    degrees = [math.degrees(math.atan(value)) for value in shear]
    centre = [0.0, 0.0] if any(shear) else None
    return F.affine(  # type: ignore[no-any-return]
        images, angle=0.0, translate=[int(value) for value in shift], scale=1.0, shear=degrees, center=centre
    )


def _adjust_contrast(images: Tensor, factor: float) -> Tensor:
    """Blend images with their mean grey level as torchvision does, which rounds the sum of a large image.

    torchvision's float32 sum of more than 256x256 levels depends on the device, the batch and the number of threads.
    """
    grey = F.rgb_to_grayscale(images, num_output_channels=1)
    mean = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64).float() / grey[0].numel()
    return images.mul(factor).add_(mean, alpha=1.0 - factor).clamp_(0, 255).to(torch.uint8)


def _blur(images: Tensor, sigma: float, scale: float) -> Tensor:
    """Blur with a kernel of a tenth of the shorter side, as in SimCLR."""
    height, width = images.shape[2:]
    side = max(3, min(height, width) // 20 * 2 + 1)
    kernel = [min(side, 2 * length - 1) for length in (width, height)]  # a single pixel has no neighbour
    return F.gaussian_blur(images, kernel, [sigma * scale, sigma * scale])  # type: ignore[no-any-return]


_OPERATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "shear x": lambda images, value, scale: _affine(images, shear=(value, 0)),
    "shear y": lambda images, value, scale: _affine(images, shear=(0, value)),
    "translate x": lambda images, value, scale: _affine(images, shift=(value * scale, 0)),
    "translate y": lambda images, value, scale: _affine(images, shift=(0, value * scale)),
    "relative translate x": lambda images, value, scale: _affine(images, shift=(value * images.shape[3], 0)),
    "relative translate y": lambda images, value, scale: _affine(images, shift=(0, value * images.shape[2])),
    "rotate": lambda images, value, scale: F.rotate(images, angle=value),
    "brightness": lambda images, value, scale: F.adjust_brightness(images, value),
    "saturation": lambda images, value, scale: F.adjust_saturation(images, value),
    "contrast": lambda images, value, scale: _adjust_contrast(images, value),
    "sharpness": lambda images, value, scale: F.adjust_sharpness(images, value),
    "hue": lambda images, value, scale: F.adjust_hue(images, value),
    "posterize": lambda images, value, scale: F.posterize(images, int(value)),
    "solarize": lambda images, value, scale: F.solarize(images, 255 * value),
    "autocontrast": lambda images, value, scale: F.autocontrast(images),
    "equalize": lambda images, value, scale: F.equalize(images),
    "grey": lambda images, value, scale: F.rgb_to_grayscale(images, num_output_channels=images.shape[1]),
    "blur": _blur,
}
