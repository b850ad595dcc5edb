"""Constants that torchvision's kernels create on a GPU, copied there without waiting for it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class PinnedConstants(TorchFunctionMode):
    """Copies constants to a GPU from pinned memory.

    ``torch.tensor(values, device="cuda")`` copies from other memory, for which the host waits until the GPU has done
    all that it was given before.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func is torch.tensor and torch.device(options.get("device") or "cpu").type == "cuda":
            device = options["device"]
            pinned: torch.Tensor = func(*args, **{**options, "device": "cpu", "pin_memory": True})
            return pinned.to(device, non_blocking=True)
        return func(*args, **options)
