"""Decoded images in a file, which is written once and mapped into memory."""

import errno
import hashlib
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.data.image_set import ImageSource, image_bytes
from kd_lightning.data.packed_images import PackedImages, packed_images, read_readable
from kd_lightning.data.pixel_map import PixelMap
from kd_lightning.errors import UserError, WriteError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.files.byte_count import describe_bytes
from kd_lightning.files.lock import hold_lock

_HEAD = struct.Struct("<16s32sQQQ32s")
"""Magic, digest of the key, number of images, place and length of the pixels, checksum of this and the index."""
_MAGIC = b"kd_lightning px1"
_ROW = np.dtype([("sample", "<i8"), ("height", "<i4"), ("width", "<i4")])
_PAGE = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedFileError(UserError):
    """A file of decoded images that is not as it was written."""


def packed_file(source: ImageSource, folder: Path, *, name: str) -> Path:
    """Return the path of the file of a source's images; it differs for other files, settings or versions of Pillow.

    Args:
        source: The images.
        folder: Folder of the file.
        name: Beginning of the file's name.
    """
    return _path(folder, name, _digest(source, source.content()))


def pack_to_file(source: ImageSource, folder: Path, *, name: str, threads: int | None = None) -> PackedImages:
    """Return all images of a source, mapped from a file that is written if it does not exist.

    The file is there completely or not at all, and one process writes it while others wait. Files of the same name
    whose images have changed since are removed.

    Args:
        source: The images.
        folder: Folder of the file, which is created.
        name: Beginning of the file's name, one for each set of images and form in which they are stored.
        threads: Number of threads that read, by default one a core; 1 for a source that is not made for threads.

    Raises:
        UserError: If an image cannot be read (with ``skip_unreadable``: none can), or has other channels.
        WriteError: If the folder cannot be written to, or its disk is full.
    """
    key = bytes(source.content())  # once, because it looks at each file
    digest = _digest(source, key)
    file = _path(folder, name, digest)
    with suppress(DamagedFileError, OSError):
        packed = _open(source, file, key, digest)
        if len(packed) < len(source):
            rank_zero_warn(f"Left out: {len(source) - len(packed)} of {len(source)} images cannot be read.")
        return packed
    lock = _prepare(folder, name)

    def wait() -> None:
        rank_zero_info(f"Waiting until another process has written {str(file)!r}.")

    with hold_lock(lock, on_wait=wait) as held:
        try:
            return _open(source, file, key, digest)
        except (FileNotFoundError, PermissionError):
            pass
        except DamagedFileError as error:
            print(f"{error} It is written again.", file=sys.stderr, flush=True)
        if held:
            _remove_older(file, name)
        _write(source, file, digest, threads=threads)
        return _open(source, file, key, digest)


def _open(source: ImageSource, file: Path, key: bytes, digest: bytes) -> PackedImages:
    """Return the images of a source that were written to a file, if it is as it was written."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise DamagedFileError(f"{str(file)!r} is not a file of decoded images.")
        _, written, count, start, length, checksum = _HEAD.unpack(head)
        index = opened.read(min(count, len(source)) * _ROW.itemsize)
    if hashlib.sha256(head[: -len(checksum)] + index).digest() != checksum:
        raise DamagedFileError(f"{str(file)!r} is damaged.")
    if file.stat().st_size != start + length:
        raise DamagedFileError(f"{str(file)!r} has been cut off.")
    if written != digest:
        raise DamagedFileError(f"{str(file)!r} holds images of other files or settings.")
    rows = np.frombuffer(index, _ROW)
    pixel_map = PixelMap(file, start, length)
    sizes = list(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True))
    return packed_images(source, rows["sample"].tolist(), sizes, pixel_map.open(), key=key, pixel_map=pixel_map)


def bytes_on_disk(source: ImageSource) -> int:
    """Return the number of bytes that the file of a source's images has, by their announced sizes."""
    return _start(len(source)) + image_bytes(source)


def _write(source: ImageSource, file: Path, digest: bytes, *, threads: int | None) -> None:
    needed, free = bytes_on_disk(source), shutil.disk_usage(file.parent).free
    if needed > free:
        raise WriteError(_no_room(needed, file.parent, f"{describe_bytes(free)} are free"))
    others = sum(other.stat().st_size for other in file.parent.glob("*.images") if other != file)
    beside = f"; other sets of images there take {describe_bytes(others)}" if others else ""
    print(f"Writing {describe_bytes(needed)} of decoded images to {str(file)!r}{beside}.", file=sys.stderr, flush=True)
    start, rows, length = _start(len(source)), np.zeros(len(source), _ROW), 0
    try:
        with atomic_write(file) as opened:
            opened.seek(start)
            count = 0
            for sample, image in _reading(source, threads):
                pixels = image.permute(1, 2, 0).contiguous().numpy()
                opened.write(pixels.data)
                rows[count] = sample, *pixels.shape[:2]
                length, count = length + pixels.nbytes, count + 1
            index = rows[:count].tobytes()
            checked = _HEAD.pack(_MAGIC, digest, count, start, length, b"")[:-32]
            opened.seek(0)
            opened.write(checked + hashlib.sha256(checked + index).digest() + index)
            opened.truncate(start + length)
    except _ReadingError as error:
        raise error.error from error.error.__cause__
    except WriteError as error:
        if getattr(error.__cause__, "errno", None) not in _FULL:
            raise
        raise WriteError(_no_room(needed, file.parent, "its disk, or your share of it, is full")) from error


class _ReadingError(Exception):
    """An error of reading the images, which says nothing about the file that is written."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _reading(source: ImageSource, threads: int | None) -> Iterator[tuple[int, Tensor]]:
    try:
        yield from read_readable(source, threads=threads)
    except Exception as error:
        raise _ReadingError(error) from error


def _no_room(needed: int, folder: Path, reason: str) -> str:
    return (
        f"{str(folder)!r} has no room for {describe_bytes(needed)} of decoded images ({reason}); make room, set "
        "data.cache to a folder on another disk, or lower data.store_size."
    )


def _prepare(folder: Path, name: str) -> Path:
    """Create the folder of the file, and return the path of the lock."""
    lock = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise WriteError(
            f"{str(folder)!r} cannot be written to ({error.strerror}); set data.cache to a folder for decoded images."
        ) from error
    return lock


def _remove_older(file: Path, name: str) -> None:
    """Remove what killed processes left, and files of images that have changed since."""
    pattern = re.compile(re.escape(name) + r"-[0-9a-f]{16}\.images(\.\d+\.tmp)?")
    for found in file.parent.iterdir():
        if pattern.fullmatch(found.name):
            with suppress(OSError):  # on Windows, another process that reads it keeps it
                found.unlink()


def _path(folder: Path, name: str, digest: bytes) -> Path:
    return folder / f"{name}-{digest.hex()[:16]}.images"


def _digest(source: ImageSource, key: bytes | memoryview) -> bytes:
    """Return the digest of all that the bytes of the file depend on."""
    digest = hashlib.sha256(f"Pillow {PIL.__version__}, {source.channels} channels, ".encode())
    digest.update(key)
    return digest.digest()


def _start(count: int) -> int:
    """Return the place of the first pixel behind an index of ``count`` rows."""
    return -(-(_HEAD.size + count * _ROW.itemsize) // _PAGE) * _PAGE
