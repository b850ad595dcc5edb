"""A check of many tensors for values that are not finite, by as few kernels as possible."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_lightning.data.augmentation.constants import constant


@torch.no_grad()
def mark_nonfinite_(found: Tensor, tensors: Iterable[Tensor]) -> None:
    """Set a flag if a value of any tensor is not finite; otherwise it stays as it is. Nothing waits for the device.

    Of the usual types all tensors are read by one kernel, torch's check of scaled gradients with a scale of 1.

    Args:
        found: The flag, a float32 scalar on the device of the tensors.
        tensors: Real or complex tensors, of sharded ones this rank's part.

    Example:
        >>> found = torch.zeros(())
        >>> mark_nonfinite_(found, [torch.ones(2), torch.tensor([0.0, float("nan")])])
        >>> found
        tensor(1.)
    """
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        real = torch.view_as_real(local) if local.is_complex() else local
        if real.numel():
            groups[real.dtype].append(real.detach())
    for dtype, group in groups.items():
        if dtype in (torch.float32, torch.float64, torch.float16):
            torch._amp_foreach_non_finite_check_and_unscale_(group, found, constant((1.0,), device=found.device))
        else:
            largest = torch.nn.utils.get_total_norm(group, torch.inf)
            found.masked_fill_(~largest.isfinite(), 1.0)
