"""The folder of images that a configuration names, found by its digest where it was moved."""

from collections.abc import Iterator
from pathlib import Path

from jsonargparse import Namespace

from kd_lightning.runs.moved import moved_folder
from kd_lightning.runs.run import Run

_ROOT = "data.init_args.root"


def data_root(options: Namespace) -> Path | None:
    """Return the folder of a user's images, ``None`` for other data."""
    is_folder = str(options.get("data.class_path")).endswith("ImageFolderDataModule")
    root = options.get(_ROOT) if is_folder else None
    return None if root is None else Path(str(root)).expanduser()


def find_images(options: Namespace, run: Run | None) -> Iterator[str]:
    """Fill in where the images of a run are now, if their folder was moved.

    Args:
        options: Options of the command, which are changed.
        run: The run that is resumed or evaluated.

    Yields:
        A sentence that reports it.
    """
    root = data_root(options)
    if root is None or root.is_dir():
        return
    moved = moved_folder(options[_ROOT], run)
    if moved is not None:
        yield f"{options[_ROOT]} has moved: {moved} has the same images."
        options[_ROOT] = str(moved)
