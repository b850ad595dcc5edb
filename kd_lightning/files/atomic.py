"""Atomic writing of files; importable without torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kd_lightning.errors import WriteError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to a path; it replaces the path once it is complete on the disk.

    If anything goes wrong before, a kill included, the previous file stays.

    Args:
        path: Path of the file; its folder is created if needed.

    Raises:
        WriteError: If the file cannot be written, for example because the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "folder", "file.txt")
        >>> with atomic_write(path) as file:
        ...     _ = file.write(b"all of it")
        >>> path.read_text()
        'all of it'
    """
    path = path.expanduser()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that someone has put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise WriteError(
            f"{str(path)!r} cannot be written ({reason.strerror or reason}); what was there before is as it was; "
            "make room or choose another place."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the error of the system, which torch.save replaces by one about a broken archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _sync(folder: Path) -> None:
    """Flush the renaming to the disk, on systems that can do so."""
    with suppress(OSError):
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
