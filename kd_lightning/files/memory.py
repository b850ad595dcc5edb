"""Main memory that a process may still take; importable without torch."""

import os
from contextlib import suppress
from pathlib import Path

_UNKNOWN = 8 * 2**30
"""Bytes that are assumed where the system does not report its memory."""


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of main memory that can be taken without swapping, within the limit of a container.

    Files that the system keeps in memory count as available, because it drops them when memory is needed.

    Args:
        root: Root of ``/proc`` and ``/sys``; another one in tests.

    Example:
        >>> available_memory() > 0
        True
    """
    return min([_of_system(root), *_of_control_groups(root)])


def _of_system(root: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):  # macOS does not count free pages; half of all may be
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return _UNKNOWN


def _of_control_groups(root: Path) -> list[int]:
    """Return what is left of the limit of each control group that the process is in, of both versions."""
    left = []
    for folder in _control_groups(root):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # "max" is no limit
                used = int((folder / usage).read_text()) - _entry(folder / "memory.stat", cache)
                left.append(max(0, int((folder / limit).read_text()) - used))
    return left


def _control_groups(root: Path) -> list[Path]:
    """Return the folders of the process's control groups and of those above them, which limit it too."""
    found = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = root / "sys/fs/cgroup" / controllers
                group = top / path.strip("/")
                found += [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return found


def _entry(file: Path, name: str) -> int:
    with suppress(OSError):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
