"""Operations that wait for a GPU: a number is read from a tensor, or a shape depends on values."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {
    "aten::_local_scalar_dense",  # .item(), bool() and float()
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::linalg_matrix_exp",
    "aten::_linalg_eigh",
    "aten::linalg_inv_ex",
    "aten::linalg_qr",
}


def refuse_waiting(operator: Any, args: Any) -> None:
    """Raise an error for an operation that waits for a GPU, or indexes by a mask."""
    name = operator.name().partition(".")[0]
    by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )
    if name in _WAITING or by_mask:
        raise RuntimeError(f"{operator.name()} waits for the device")


class RefuseWaiting(TorchDispatchMode):
    """Raises an error for operations that wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_waiting(func, args)
        return func(*args, **(kwargs or {}))
