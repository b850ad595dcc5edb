"""Logits of fixed views, in memory or in a folder, so that a teacher runs once a view and not in each step."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.files.format import FORMAT, KEY

_LARGEST = 65504.0
"""Largest finite float16."""
_RECORD = "created_from.json"
_CHECKSUM = 4
"""Number of bytes of the CRC-32 at the end of a view's file."""


class OutputCache:
    """Logits in float16 by ``ids = sample * V + view``, in memory or in a folder that outlives the run.

    In a folder each view is a file that is mapped into memory and ends with its checksum, and ``created_from.json``
    records the settings that decide the logits. Files are written atomically: a view is complete, or absent.

    Args:
        samples: Number of samples, N.
        classes: Number of classes, C.
        views: Number of views, V.
        fingerprint: Settings that decide the logits, by name.
        folder: Folder of the views; ``None`` for memory.

    Attributes:
        current_view: Number of the loaded view.

    Raises:
        UserError: If the folder contains other files, or logits that were computed differently (the message
            names them).

    Example:
        >>> cache = OutputCache(samples=3, classes=2, views=4, fingerprint={})
        >>> cache.put(1, torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
        >>> cache.load(1, torch.device("cpu"))
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
        self.current_view: int | None = None
        self._memory: dict[int, Tensor] = {}
        self._current: Tensor | None = None
        self._fingerprint = {KEY: FORMAT, **fingerprint}
        if folder is not None:
            self._check_folder(folder)

    def __contains__(self, view: int) -> bool:
        """Return whether a view is complete."""
        return view in self._memory or self._read(view) is not None

    def shows(self, epoch: int) -> bool:
        """Return whether the loaded view is that of an epoch."""
        return epoch % self.views == self.current_view

    def put(self, view: int, logits: Tensor) -> None:
        """Store the logits ``(N, C)`` of a view."""
        half = to_float16(logits).cpu()
        if self.folder is None:
            self._memory[view] = half
            return
        self._check_folder(self.folder)  # another run may have created it meanwhile
        content = half.numpy().astype("<f2").tobytes()
        if self._recorded(self.folder) is None:
            with atomic_write(self.folder / _RECORD) as file:
                file.write(json.dumps(self._fingerprint, indent=1).encode())
        with atomic_write(self._file(view)) as file:
            file.write(content)
            file.write(self._checksum(view, content).to_bytes(_CHECKSUM, "little"))

    def load(self, view: int, device: torch.device) -> None:
        """Make a view the current one: a CPU reads it where it is, for other devices it is copied.

        Raises:
            KeyError: If it is not complete.
        """
        logits = self._memory[view] if view in self._memory else self._read(view)
        if logits is None:
            raise KeyError(view)
        if device.type == "cpu":
            self._current = logits.to(device)
        elif self._current is None or self._current.device != device:
            self._current = logits.to(device, copy=True)
        else:
            self._current.copy_(logits)  # in place: a captured step reads it there
        self.current_view = view

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits ``(B, C)`` of the current view in float32."""
        assert self._current is not None
        rows = ids // self.views if self.views > 1 else ids
        return self._current.index_select(0, rows).float()

    def _file(self, view: int) -> Path:
        assert self.folder is not None
        return self.folder / f"view-{view:04}.float16"

    def _read(self, view: int) -> Tensor | None:
        """Return a view mapped into memory, or ``None`` if its file is missing or damaged."""
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
        """Return the CRC-32 of logits together with their view and settings."""
        owner = json.dumps([view, *self.shape, self._fingerprint], sort_keys=True)
        return zlib.crc32(content, zlib.crc32(owner.encode()))

    def _recorded(self, folder: Path) -> Mapping[str, object] | None:
        """Return the settings of the logits in a folder, or ``None`` if there are no logits."""
        try:
            recorded = json.loads((folder / _RECORD).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError):
            recorded = None
        if not isinstance(recorded, dict):
            raise UserError(f"{str(folder / _RECORD)!r} is damaged; delete the folder or name another one.")
        return recorded

    def _check_folder(self, folder: Path) -> None:
        files = list(folder.iterdir()) if folder.is_dir() else []
        if (folder.exists() and not folder.is_dir()) or not all(
            file.name.startswith(("view-", _RECORD)) for file in files
        ):
            raise UserError(f"{str(folder)!r} contains other files than cached logits; name an empty folder.")
        recorded = self._recorded(folder)
        if recorded is None:
            return
        differ = [name for name, value in self._fingerprint.items() if recorded.get(name) != value]
        if differ:
            raise UserError(
                f"The logits in {str(folder)!r} were computed differently (different: {', '.join(differ)}); name "
                "another folder with teacher_cache, or delete this one."
            )


def to_float16(logits: Tensor) -> Tensor:
    """Return logits in float16, with the largest numbers clipped rather than infinite."""
    return logits.float().clamp(-_LARGEST, _LARGEST).half()
