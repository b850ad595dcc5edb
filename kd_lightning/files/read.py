"""Reading of files of tensors and plain data; code in them is never run."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from kd_lightning.errors import MissingFileError, UserError, first_line
from kd_lightning.files.numpy_numbers import numpy_numbers


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of tensors and plain data on any machine; code in it is never run.

    Args:
        path: Path of a ``.ckpt``, ``.pt``, ``.pth``, ``.th`` (anything of ``torch.save``) or ``.safetensors``
            file.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged (its checksums reveal a flipped bit), contains code, or has another format.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weight": torch.zeros(2)}, f"{folder}/weights.pt")
        ...     read_checkpoint(f"{folder}/weights.pt")
        {'weight': tensor([0., 0.])}
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(f"There is no checkpoint {str(path)!r}; check the path, or train the network first.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch writes a checksum for each record and never checks it
                # a record that one flipped bit in the index marks as a folder is not read: its memory stays undefined
                folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
            if damaged or folders:
                raise UserError(f"its record {damaged or folders[0]!r} does not match its checksum or its index")
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{str(path)!r} is not a checkpoint of tensors and plain data (it is damaged, has another format, or "
            "contains code, which was not run); export its state dict with torch.save where it was made."
        ) from error
    except Exception as error:
        raise UserError(
            f"{str(path)!r} cannot be read as a checkpoint ({first_line(error)}); it is damaged or of another "
            "format, copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__} and not a state dict or a checkpoint.")
    return content


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        with numpy_numbers():
            return torch.load(path, map_location="cpu", weights_only=True)
