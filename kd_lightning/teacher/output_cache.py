"""The teacher's logits of fixed views, so that it runs once a view and not once a step."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.files.atomic import atomic_write

_LARGEST = 65504.0
"""Of float16."""
_RECORD = "made-of.json"
_CHECKSUM = 4
"""Bytes of the CRC-32 at the end of a view's file."""


class OutputCache:
    """Logits in float16 by ``ids = sample * V + view``, in memory or in a folder that outlives the run.

    In a folder each view is a file that is mapped into memory and ends with its checksum, and ``made-of.json`` records
    what the logits were made of. Files are written beside their place and moved there: a view is whole, or absent.

    Args:
        samples: Number of samples, N.
        classes: Number of classes, C.
        views: V.
        fingerprint: What decides the logits, by name.
        folder: Where the views are kept; ``None`` for memory.

    Raises:
        ValueError: If the folder holds something else, or logits that were made otherwise (the message says what
            differs).

    Example:
        >>> cache = OutputCache(samples=3, classes=2, views=4, fingerprint={})
        >>> cache.put(1, torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
        >>> cache.show(1, torch.device("cpu"))
        >>> cache(torch.tensor([2 * 4 + 1, 0 * 4 + 1]))
        tensor([[4., 5.],
                [0., 1.]])
    """

    def __init__(
        self, samples: int, classes: int, views: int, fingerprint: Mapping[str, str], folder: Path | None = None
    ) -> None:
        self.shape = (samples, classes)
        self.views = views
        self.folder = folder
        self.shown: int | None = None
        self._memory: dict[int, Tensor] = {}
        self._current: Tensor | None = None
        self._fingerprint = dict(fingerprint)
        if folder is not None:
            self._refuse_other(folder)

    def __contains__(self, view: int) -> bool:
        """Whether a view is whole."""
        return view in self._memory or self._read(view) is not None

    def put(self, view: int, logits: Tensor) -> None:
        """Keep the logits ``(N, C)`` of a view."""
        half = halved(logits).cpu()
        if self.folder is None:
            self._memory[view] = half
            return
        self._refuse_other(self.folder)  # another run may have made it meanwhile
        content = half.numpy().astype("<f2").tobytes()
        if self._recorded(self.folder) is None:
            with atomic_write(self.folder / _RECORD) as file:
                file.write(json.dumps(self._fingerprint, indent=1).encode())
        with atomic_write(self._file(view)) as file:
            file.write(content)
            file.write(self._checksum(view, content).to_bytes(_CHECKSUM, "little"))

    def show(self, view: int, device: torch.device) -> None:
        """Put a view that is whole on the device, from where it is read from now on.

        Raises:
            KeyError: If it is not whole.
        """
        logits = self._memory[view] if view in self._memory else self._read(view)
        if logits is None:
            raise KeyError(view)
        self._current = logits.to(device)
        self.shown = view

    def __call__(self, ids: Tensor) -> Tensor:
        """float32 ``(B, C)`` of the view that is shown."""
        assert self._current is not None
        return self._current.index_select(0, ids // self.views).float()

    def _file(self, view: int) -> Path:
        assert self.folder is not None
        return self.folder / f"view-{view:04}.float16"

    def _read(self, view: int) -> Tensor | None:
        """A view whose file is as long as it must be and fits its checksum, mapped into memory."""
        if self.folder is None or not self._file(view).is_file():
            return None
        samples, classes = self.shape
        if self._file(view).stat().st_size != 2 * samples * classes + _CHECKSUM:
            return None
        stored = np.memmap(self._file(view), dtype=np.uint8, mode="c")
        content, checksum = stored[:-_CHECKSUM], int.from_bytes(stored[-_CHECKSUM:].tobytes(), "little")
        if self._checksum(view, content.data) != checksum:
            return None
        return torch.from_numpy(content.view("<f2").reshape(self.shape))

    def _checksum(self, view: int, content: bytes | memoryview) -> int:
        """Of the logits, and of what makes them those of this view."""
        owner = json.dumps([view, *self.shape, self._fingerprint], sort_keys=True)
        return zlib.crc32(content, zlib.crc32(owner.encode()))

    def _recorded(self, folder: Path) -> dict[str, Any] | None:
        """What the folder's logits were made of."""
        try:
            recorded = json.loads((folder / _RECORD).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError):
            recorded = None
        if not isinstance(recorded, dict):
            raise UserError(f"{str(folder / _RECORD)!r} is damaged; delete the folder or name another one.")
        return recorded

    def _refuse_other(self, folder: Path) -> None:
        files = list(folder.iterdir()) if folder.is_dir() else []
        if (folder.exists() and not folder.is_dir()) or not all(
            file.name.startswith(("view-", _RECORD)) for file in files
        ):
            raise UserError(f"{str(folder)!r} holds something else than a teacher's logits; name an empty folder.")
        recorded = self._recorded(folder)
        if recorded is None:
            return
        differ = [name for name, value in self._fingerprint.items() if recorded.get(name) != value]
        if differ:
            raise UserError(
                f"The logits in {str(folder)!r} were made otherwise (different: {', '.join(differ)}); name another "
                "folder with teacher_cache, or delete this one."
            )


def halved(logits: Tensor) -> Tensor:
    """In float16, the largest numbers cut off rather than infinite."""
    return logits.float().clamp(-_LARGEST, _LARGEST).half()
