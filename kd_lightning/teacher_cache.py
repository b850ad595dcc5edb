"""The teacher's logits of fixed views, so that it runs once a view and not once a step."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST = 65504.0
"""Of float16."""


class TeacherCache:
    """Logits in float16 by ``ids = sample * V + view``, in memory or in a folder that outlives the run.

    In a folder each view is a file that is mapped into memory, and ``index.json`` records what the logits were made of
    and which views are whole, with checksums. All files are written beside their place and moved there.

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
        >>> cache = TeacherCache(samples=3, classes=2, views=4, fingerprint={})
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
        half = logits.clamp(-_LARGEST, _LARGEST).half().cpu()
        if self.folder is None:
            self._memory[view] = half
            return
        content = half.numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file(view).with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, content)
        _move(temporary, self._file(view))
        index = self._index() or {"fingerprint": self._fingerprint, "checksums": {}}
        index["checksums"][str(view)] = zlib.crc32(content.tobytes())
        temporary = self.folder / f"index.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(index, indent=1))
        _move(temporary, self.folder / "index.json")

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
        return self.folder / f"view-{view:04}.npy"

    def _index(self) -> dict[str, Any] | None:
        assert self.folder is not None
        path = self.folder / "index.json"
        if not path.is_file():
            return None
        try:
            index = json.loads(path.read_text())
            return {"fingerprint": dict(index["fingerprint"]), "checksums": dict(index["checksums"])}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{str(path)!r} is no index of a teacher's logits; delete it or name another folder."
            ) from error

    def _read(self, view: int) -> Tensor | None:
        """A view whose file is there and has the checksum that was recorded."""
        index = None if self.folder is None else self._index()
        if index is None or str(view) not in index["checksums"] or not self._file(view).is_file():
            return None
        try:
            content = np.load(self._file(view), mmap_mode="c", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            return None
        whole = zlib.crc32(content.tobytes()) == index["checksums"][str(view)]
        return torch.from_numpy(content) if whole and content.shape == self.shape else None

    def _refuse_other(self, folder: Path) -> None:
        index = self._index()
        if index is None:
            files = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
            if not all(file.name.startswith(("view-", "index.")) for file in files):
                raise ValueError(f"{str(folder)!r} holds something else than a teacher's logits; name an empty folder.")
            return
        differ = [name for name, value in self._fingerprint.items() if index["fingerprint"].get(name) != value]
        if differ:
            raise ValueError(
                f"The logits in {str(folder)!r} were made otherwise (different: {', '.join(differ)}); name another "
                "folder with teacher_cache, or delete this one."
            )


def _move(temporary: Path, place: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(place)
