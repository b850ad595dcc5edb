"""Digests of files; importable without torch."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file, read in pieces.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "file.txt")
        >>> _ = path.write_bytes(b"abc")
        >>> sha256(path)[:16]
        'ba7816bf8f01cfea'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
