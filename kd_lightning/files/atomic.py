"""Files that are written whole or not at all; needs no torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kd_lightning.errors import WriteError


@contextmanager
def atomic_write(place: Path) -> Iterator[BinaryIO]:
    """A file to write to, beside its place; it is moved there once it is on the disk.

    Whatever goes wrong before, a kill included, what was in the place stays.

    Args:
        place: Where the file will be; its folder is made if need be.

    Raises:
        OSError: If it cannot be written (the disk is full, for example); the message says what to do.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp(), "folder", "file.txt")
        >>> with atomic_write(place) as file:
        ...     _ = file.write(b"all of it")
        >>> place.read_text()
        'all of it'
    """
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that someone has put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
        _sync(place.parent)
    except (OSError, RuntimeError) as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise WriteError(
            f"{str(place)!r} cannot be written ({reason.strerror or reason}); what was there before is as it was; "
            "make room or choose another place."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _refusal(error: BaseException | None) -> OSError | None:
    """What the system said; torch.save reports it as a broken archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _sync(folder: Path) -> None:
    """The move itself to the disk, on systems that can do so."""
    with suppress(OSError):
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
