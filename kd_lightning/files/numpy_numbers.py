"""NumPy's numbers in files of torch.save, read as Python's; no code of NumPy runs.

Published checkpoints hold them beside the weights: a learning rate that NumPy computed, or an accuracy.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch

_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"}
_FORMATS |= dict(zip(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"), "bhiqBHIQ", strict=True))
_ORDERS = {"<": "<", ">": ">", "|": "="}


class _Kind:
    """Type of a number, in place of ``numpy.dtype``; without a number, an object that does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.format = _FORMATS.get(str(arguments[0])) if arguments else None

    def __setstate__(self, state: object) -> None:
        order = _ORDERS.get(str(state[1])) if isinstance(state, tuple) and len(state) > 1 else None
        self.format = None if order is None or self.format is None else order + self.format


def _number(kind: object, data: object = b"") -> float:
    if not isinstance(kind, _Kind) or kind.format is None or not isinstance(data, bytes):
        raise UnpicklingError("a number of NumPy of an unknown kind")
    value: float = struct.unpack(kind.format, data)[0]
    return value


@contextmanager
def numpy_numbers() -> Iterator[None]:
    """Let ``torch.load(..., weights_only=True)`` read numbers of NumPy, as Python's.

    Example:
        >>> import io, numpy
        >>> file = io.BytesIO()
        >>> torch.save({"lr": numpy.float64(0.5)}, file)
        >>> with numpy_numbers():
        ...     torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        {'lr': 0.5}
    """
    scalars = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before and since NumPy 2
    with torch.serialization.safe_globals([(_Kind, "numpy.dtype"), *((_number, name) for name in scalars)]):
        yield
