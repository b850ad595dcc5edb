"""Half-precision inputs are computed in float32; float32 and float64 keep their type."""

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")


def in_full_precision(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Wrap a function of tensors so that float16 and bfloat16 arguments arrive as float32, with autocast off inside.

    Example:
        >>> @in_full_precision
        ... def energy(features):
        ...     return features.square().sum()
        >>> energy(torch.full((2,), 300.0, dtype=torch.float16))
        tensor(180000.)
    """

    @wraps(function)
    def wrapper(*args: Arguments.args, **options: Arguments.kwargs) -> Tensor:
        device = next(_devices((*args, *options.values())), "cpu")
        with torch.autocast(device, enabled=False):
            widened = {name: _widen(value) for name, value in options.items()}
            return function(*map(_widen, args), **widened)  # type: ignore[arg-type]

    return wrapper


def _devices(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.device.type
        elif isinstance(value, list | tuple):
            yield from _devices(value)


def widen(tensor: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, and other types as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _widen(value: object) -> object:
    if isinstance(value, Tensor):
        return widen(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return [_widen(item) for item in value]
    return value
