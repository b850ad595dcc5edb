"""Files of teachers, found again by their digests after they were moved; importable without torch."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_lightning.files.digest import sha256
from kd_lightning.runs.run import LOGS, Run


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a file is found again by: its path, size and digest.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "teacher.pt")
        >>> _ = file.write_bytes(b"abc")
        >>> described = describe_file(file)
        >>> described["bytes"], described["sha256"][:16]
        (3, 'ba7816bf8f01cfea')
    """
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}


def find_moved(described: Mapping[str, Any], folders: Iterable[Path]) -> Path | None:
    """Return the checkpoint of a run with the digest of a file that is no longer where it was, or ``None``.

    Only files of the same size are read.

    Args:
        described: As :func:`describe_file` returns it.
        folders: Folders whose runs are looked at, in this order, beside ``lightning_logs``.
    """
    size, digest = described.get("bytes"), described.get("sha256")
    for folder in dict.fromkeys([*folders, LOGS]):
        files = [file for run in Run.all_below(folder) for file in run.checkpoints]
        for file in dict.fromkeys([*files, *folder.glob("*.ckpt"), *folder.glob("*.pt*")]):
            with suppress(OSError):
                if file.stat().st_size == size and sha256(file) == digest:
                    return file
    return None
