"""Finds the image files in a folder; importable without torch."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from kd_lightning.errors import UserError
from kd_lightning.files.images import readable_suffixes


@dataclass(frozen=True)
class FoundImages:
    """Image files and others in a folder, without hidden ones.

    Attributes:
        files: Image files, sorted.
        left_out: Number of other files by their suffix.
    """

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_images(folder: Path, *, recursive: bool = True) -> FoundImages:
    """Find the image files in a folder, whose suffixes are those that the installed Pillow reads.

    Links are followed. Hidden files and folders, and those that systems leave behind (``__MACOSX``, ``Thumbs.db``),
    are ignored.

    Args:
        folder: The folder.
        recursive: Search its sub-folders too.

    Raises:
        UserError: If a folder cannot be listed.
    """
    found, readable = FoundImages(), readable_suffixes()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_list):
        real = Path(place).resolve()
        folders[:] = [
            name for name in folders if recursive and not is_hidden(name) and not _contains(Path(place, name), real)
        ]
        for file in (Path(place, name) for name in names if not is_hidden(name)):
            suffix = file.suffix.lower()
            if suffix in readable:
                found.files.append(file)
            else:
                found.left_out[suffix] += 1
    found.files.sort()
    return found


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or one of those that systems leave behind.

    Example:
        >>> is_hidden("._photo.jpg"), is_hidden("__MACOSX"), is_hidden("photo.jpg")
        (True, True, False)
    """
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def describe_left_out(folder: Path, left_out: Counter[str]) -> str:
    """Return a sentence that counts the files that are not read.

    Example:
        >>> describe_left_out(Path("photos"), Counter({".webm": 2, ".txt": 1}))
        "3 files of 'photos' are left out, since Pillow does not read them as images: 2 .webm, 1 .txt."
    """
    packages = [package for package, suffixes in _PACKAGES.items() if suffixes & left_out.keys()]
    advice = f"; install {' and '.join(packages)} to read more of them" if packages else ""
    many = left_out.total() > 1
    return (
        f"{left_out.total()} file{'s' * many} of {str(folder)!r} {'are' if many else 'is'} left out, since Pillow does "
        f"not read {'them as images' if many else 'it as an image'}: {describe_suffixes(left_out)}{advice}."
    )


def describe_suffixes(files: Counter[str]) -> str:
    """Return the number of files of each suffix, for a message.

    Example:
        >>> describe_suffixes(Counter({".heic": 2, "": 1}))
        '2 .heic, 1 without suffix'
    """
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in files.most_common())


_SYSTEM_NAMES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin"}
_PACKAGES = {"pillow-heif": {".heic", ".heif", ".hif"}, "pillow-jxl-plugin": {".jxl"}}


def _contains(folder: Path, inner: Path) -> bool:
    """Return whether a folder is a link to one that it lies in."""
    return folder.is_symlink() and inner.is_relative_to(folder.resolve())


def _cannot_list(error: OSError) -> NoReturn:
    raise UserError(f"The folder {error.filename!r} cannot be listed ({error.strerror}); make it readable.") from error
