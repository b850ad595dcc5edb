"""Rebuilds the data module and the images of a run from its configuration."""

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.data.protocol import is_image_data
from kd_lightning.data.shapes import resize, with_channels
from kd_lightning.errors import UserError
from kd_lightning.runs.moved import moved_folder
from kd_lightning.runs.run import Run


def load_images(data: Any, split: str, count: int | None) -> tuple[Tensor, Tensor] | None:
    """Return images and labels of a run's data module as :meth:`Run.images` describes."""
    part = getattr(data, "target", data)  # of a domain pair: the network is used on its target
    try:
        part.prepare_data()
        part.setup("test" if split == "test" else "fit")
    except OSError:
        return None
    images: list[Tensor] = []
    labels: list[Tensor] = []
    loader = part.plain_train_dataloader() if split == "train" else getattr(part, f"{split}_dataloader")()
    for batch in loader:
        pixels = part.pixels(batch).float() / 255
        if part is not data:
            pixels = with_channels(resize(pixels, size=data.image_shape[1:]), channels=data.image_shape[0])
        images.append(pixels)
        labels.append(batch.labels)
        if count is not None and sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def build_data(config: dict[str, Any], run: Run) -> Any:
    """Build the data module of a run as :meth:`Run.data` describes.

    A folder of images that was moved is found by its digest, and that is printed.

    Args:
        config: The ``data`` section of the run's configuration.
        run: The run.

    Raises:
        UserError: If the data module cannot be built.
    """
    root = (config.get("init_args") or {}).get("root")
    if root is not None and not Path(str(root)).expanduser().is_dir() and (moved := moved_folder(root, run)):
        rank_zero_info(f"{root} has moved: {moved} has the same images.")
        config = {**config, "init_args": {**config["init_args"], "root": str(moved)}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": config})).data
    except (ArgumentError, ValueError) as error:
        text = " ".join(str(error).split())
        reason = (text.partition("Errors: - ")[2] or text).partition(" - Expected a <")[0][:300].rstrip(".")
        raise UserError(
            f"The data of {str(run.config_file)!r} cannot be built ({reason}); correct that, or make it importable."
        ) from error
    return data if is_image_data(data) else None
