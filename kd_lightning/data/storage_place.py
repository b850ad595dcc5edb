"""Choice of the place where decoded images are kept: memory, a mapped file, or none."""

import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from kd_lightning.errors import UserError
from kd_lightning.files.byte_count import describe_bytes

OFF = "off"
"""Value of ``data.cache`` with which no file is written."""
_OF_MEMORY = 0.5
_OF_DISK = 0.9
_OF_DEVICE = 0.25


class Resources(NamedTuple):
    """Memory and disk of a node.

    Attributes:
        processes: Number of processes of this node, each of which has its own copy of what is kept in memory.
        memory: Bytes of memory that are available to all of them.
        disk: Bytes that are free where the file is written; ``None`` if nothing can be written there.
    """

    processes: int
    memory: int
    disk: int | None


class Choice(NamedTuple):
    """A place, and the reason for it.

    Attributes:
        place: ``"memory"``; ``"mapped"`` for a file; or ``"workers"``, which decode images again for each batch.
        reason: One sentence, with the flags that change the choice.
    """

    place: Literal["memory", "mapped", "workers"]
    reason: str


def choose_place(
    needed: int,
    resources: Resources,
    *,
    memory_limit: float | None = None,
    cache: str | None = None,
    written: bool = False,
    kept: int = 0,
) -> Choice:
    """Return where decoded images are kept.

    A file is used if it exists already, if the user names its folder, if several processes can share it, or if the
    images do not fit into memory.

    Args:
        needed: Bytes of the decoded images.
        resources: Memory and disk of this node.
        memory_limit: GiB of a node's memory for decoded images, by default half of what is available.
        cache: Folder of the file; ``None`` for one beside the images, ``"off"`` for no file.
        written: True if the file exists.
        kept: Bytes of other images that this process keeps in memory already.

    Raises:
        UserError: If there is no room in the folder that the user names.

    Example:
        >>> choose_place(3 * 2**30, Resources(processes=1, memory=16 * 2**30, disk=None)).reason
        '3.0 GiB of decoded images are kept in memory (at most 8.0 GiB, see data.memory_limit).'
    """
    images = f"{describe_bytes(needed)} of decoded images"
    limit = _memory_for_images(resources, memory_limit, kept)
    may_write = cache != OFF
    has_room = resources.disk is not None and needed <= _OF_DISK * resources.disk
    if may_write and written:
        return Choice("mapped", f"{images} are read from a file of an earlier run ({_flag(cache)}).")
    if cache is not None and may_write:
        if not has_room:
            raise UserError(
                f"data.cache {cache!r} has no room for {images} ({_free(resources.disk)}); name another folder, or off."
            )
        return Choice("mapped", f"{images} are kept in a file ({_flag(cache)}).")
    if may_write and has_room and resources.processes > 1:
        return Choice(
            "mapped", f"{images} are kept in a file that {resources.processes} processes share ({_flag(cache)})."
        )
    copies = f" for each of {resources.processes} processes" if resources.processes > 1 else ""
    room = f"at most {describe_bytes(limit)}{copies}, see data.memory_limit"
    if needed <= limit:
        return Choice("memory", f"{images} are kept in memory ({room}).")
    if may_write and has_room:
        return Choice("mapped", f"{images} are kept in a file, because memory has no room ({room}; {_flag(cache)}).")
    disk = _free(resources.disk) if may_write else "data.cache is off"
    return Choice(
        "workers",
        f"Images are decoded again for each batch by data.num_workers, because there is no room for {images} in memory "
        f"({room}) or in a file ({disk}); set data.cache to a folder on another disk, or lower data.store_size.",
    )


def fits_on_device(needed: int, free: int) -> bool:
    """Return whether images may lie on a device whole, where they leave room for the training.

    Args:
        needed: Bytes of the images.
        free: Bytes of the device's memory that are free.
    """
    return needed <= _OF_DEVICE * free


def free_disk(folder: Path) -> int | None:
    """Return the bytes that are free for a folder that may not exist yet, ``None`` if it cannot be written to."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    if existing is None or not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return None
    return shutil.disk_usage(existing).free


def _memory_for_images(resources: Resources, memory_limit: float | None, kept: int) -> int:
    """Return the bytes that each process may add to what it keeps."""
    if memory_limit is None:
        return int(_OF_MEMORY * resources.memory) // resources.processes
    left = int(memory_limit * 2**30) - kept * resources.processes
    return max(0, min(left, resources.memory)) // resources.processes


def _flag(cache: str | None) -> str:
    return "data.cache sets its folder, or off" if cache is None else f"data.cache {cache}"


def _free(disk: int | None) -> str:
    return "its folder cannot be written to" if disk is None else f"{describe_bytes(disk)} are free"
