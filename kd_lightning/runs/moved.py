"""Files of teachers and folders of images, found again by their digests after they were moved."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_lightning.errors import UserError
from kd_lightning.files.digest import sha256
from kd_lightning.files.find_images import find_images, is_hidden
from kd_lightning.runs.run import LOGS, Run

_WEIGHTS = {".ckpt", ".pt", ".pth", ".th", ".safetensors"}
_CLASS_FOLDERS = 2
"""Folders below the root of a set of images that are compared before all of its files are listed."""


def describe_file(path: str | Path) -> dict[str, Any]:
    """Return what a file is found again by: its path, size and digest.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "teacher.pt")
        >>> _ = file.write_bytes(b"abc")
        >>> described = describe_file(file)
        >>> described["bytes"], described["sha256"][:16]
        (3, 'ba7816bf8f01cfea')
    """
    file = Path(path).expanduser()
    return {"path": str(path), "bytes": file.stat().st_size, "sha256": sha256(file)}


def describe_images(root: str | Path) -> dict[str, Any]:
    """Return what a folder of images is found again by: its path, and digests of the names and sizes in it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "cats").mkdir()
        >>> (folder / "cats/1.png").touch()
        >>> describe_images(folder)["count"]
        1
    """
    folder = Path(root).expanduser()
    files = find_images(folder).files
    listed = [f"{file.relative_to(folder).as_posix()} {file.stat().st_size}" for file in files]
    return {
        "path": str(root),
        "count": len(files),
        "folders": _digest(_folders(folder)),
        "sha256": _digest(listed),
    }


def find_file(described: Mapping[str, Any], run: Run | None = None) -> Path | None:
    """Return the file with the digest of one that is no longer where it was, or ``None``.

    Checkpoints of the runs in ``lightning_logs`` and beside a run are compared, and files of weights in the working
    folder and in its folders. Only files of the same size are read.

    Args:
        described: As :func:`describe_file` returns it.
        run: The run that used the file, which may have been moved together with it.
    """
    for file in dict.fromkeys(_weights(run)):
        with suppress(OSError):
            if file.stat().st_size == described.get("bytes") and sha256(file) == described.get("sha256"):
                return file
    return None


def find_folder(described: Mapping[str, Any]) -> Path | None:
    """Return the folder with the images of one that is no longer where it was, or ``None``.

    Folders beside the former place and in the working folder are compared, and those in them.

    Args:
        described: As :func:`describe_images` returns it.
    """
    former = Path(str(described.get("path"))).expanduser()
    places = [former.parent, former.parent.parent, Path()]
    nearby = [near for place in places for near in _inner(place)]
    for folder in dict.fromkeys([*nearby, *(inner for near in nearby for inner in _inner(near))]):
        with suppress(OSError, UserError):
            if _digest(_folders(folder)) == described.get("folders"):
                found = describe_images(folder)
                if (found["count"], found["sha256"]) == (described.get("count"), described.get("sha256")):
                    return folder
    return None


def moved_file(name: str | Path, run: Run | None) -> Path | None:
    """Return where a file of a run's teacher is now, if it was moved; ``None`` if it is unknown or not found."""
    for described in (_described(run, "teachers") or []) if run else []:
        if isinstance(described, dict) and described.get("path") == str(name):
            return find_file(described, run)
    return None


def moved_folder(name: str | Path, run: Run | None) -> Path | None:
    """Return where the folder of a run's images is now, if it was moved; ``None`` if it is unknown or not found."""
    described = _described(run, "images")
    return find_folder(described) if isinstance(described, dict) and described.get("path") == str(name) else None


def _described(run: Run | None, key: str) -> Any:
    with suppress(UserError):  # a damaged fit.json
        return ((run.fit if run else None) or {}).get(key)
    return None


def _weights(run: Run | None) -> Iterator[Path]:
    beside = [] if run is None else [folder for folder in run.folder.parents[:3] if _holds_runs(folder)]
    for folder in dict.fromkeys([LOGS, *beside]):
        yield from (file for each in Run.all_below(folder) for file in each.checkpoints)
    for folder in (Path(), *_inner(Path())):
        yield from (file for file in folder.iterdir() if file.suffix in _WEIGHTS and file.is_file())


def _holds_runs(folder: Path) -> bool:
    """Return whether a folder may be searched: neither the working folder nor one that holds it."""
    return not Path.cwd().is_relative_to(folder.resolve())


def _inner(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:  # which knows the kind of each entry without a look at it
        return sorted(folder / entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    return []


def _folders(root: Path, depth: int = _CLASS_FOLDERS) -> list[str]:
    """Return the names of the folders in a folder, and of those in them."""
    names: list[str] = []
    for folder in _inner(root):
        names.append(folder.name)
        if depth > 1:
            names += [f"{folder.name}/{name}" for name in _folders(folder, depth - 1)]
    return names


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
