"""Locks between processes; importable without torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two processes do the same work
    fcntl = None  # type: ignore[assignment]


@contextmanager
def hold_lock(path: Path, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold a lock that one process at a time has; the system frees it if the process is killed.

    Args:
        path: File of the lock, which is created and stays.
        on_wait: Called once if another process holds the lock, before waiting for it.

    Yields:
        Whether the lock is held: some network file systems and Windows have none.

    Example:
        >>> import tempfile
        >>> with hold_lock(Path(tempfile.mkdtemp(), "lock")) as held:
        ...     pass
    """
    with path.open("a") as file:
        yield _lock(file.fileno(), on_wait)


def _lock(descriptor: int, on_wait: Callable[[], None]) -> bool:
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True
