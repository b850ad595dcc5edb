"""A copy of a module's buffers that takes few kernels to make and to restore."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """Copies of buffers, one flat tensor for each device and type, so that no kernel runs for a single buffer.

    Args:
        buffers: Buffers by name.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> snapshot = BufferSnapshot(dict(norm.named_buffers()))
        >>> _ = norm.running_mean.fill_(5.0)
        >>> snapshot.restore(norm, torch.tensor(True))
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, buffer in buffers.items():
            groups.setdefault((buffer.device, buffer.dtype), {})[name] = buffer
        self._flat = {tuple(group): _flatten(group) for group in groups.values()}
        self._shapes = {name: buffer.shape for name, buffer in buffers.items()}

    @torch.no_grad()
    def restore(self, module: nn.Module, restored: Tensor) -> None:
        """Copy the buffers back where ``restored``, a boolean scalar, is true; the host does not read it."""
        buffers = dict(module.named_buffers())
        for names, before in self._flat.items():
            group = {name: buffers[name] for name in names if name in buffers}
            if tuple(group) != names:
                continue  # a buffer was removed within the step
            chosen = torch.where(restored.to(before.device), before, _flatten(group))
            parts = chosen.split([buffer.numel() for buffer in group.values()])
            torch._foreach_copy_(
                list(group.values()), [part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)]
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the copies by name."""
        found: dict[str, Tensor] = {}
        for names, flat in self._flat.items():
            parts = flat.split([self._shapes[name].numel() for name in names])
            found |= {name: part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        return found


def _flatten(group: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in group.values()])
