"""What is rebuilt from the files of a run: its network, its data module, its images."""

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from kd_lightning.checkpoints.io import read_run_checkpoint
from kd_lightning.checkpoints.trust import check_trusted_classes
from kd_lightning.data.shapes import resize, with_channels
from kd_lightning.errors import UserError
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.runs.run import Run


def load_network(checkpoint: Path) -> nn.Module:
    """Return the network of a checkpoint of the command line, with its weights and ``data_config``, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of this package, or was saved from Python.
    """
    saved = read_run_checkpoint(checkpoint).get("hyper_parameters", {})
    check_trusted_classes(saved, str(checkpoint))
    path = saved.get("_class_path")
    kind = _imported(path) if isinstance(path, str) else None
    if not (isinstance(kind, type) and issubclass(kind, ClassificationModule)):
        raise UserError(
            f"{str(checkpoint)!r} does not say how its network is built, as checkpoints of the command line do; build "
            "the network in Python, fill it with from_checkpoint, and call kd_lightning.export.export_network."
        )
    options: dict[str, Any] = {"teacher": None} if "teacher" in saved else {}
    return kind.load_from_checkpoint(checkpoint, map_location="cpu", **options).network.eval()


def load_images(run: Run, split: str, count: int | None) -> tuple[Tensor, Tensor] | None:
    """Return images and labels as :meth:`Run.images` describes."""
    data = build_data(run)
    if data is None:
        return None
    part = getattr(data, "target", data)  # of a domain pair: the network is used on its target
    try:
        part.prepare_data()
        part.setup("test" if split == "test" else "fit")
    except OSError:
        return None
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in getattr(part, f"{split}_dataloader")():
        pixels = part.pixels(batch._replace(epoch=-1)).float() / 255
        images.append(with_channels(resize(pixels, data.image_shape[1:]), data.image_shape[0]))
        labels.append(batch.labels)
        if count is not None and sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def build_data(run: Run) -> Any:
    """Return the data module as :meth:`Run.data` describes."""
    config = run.config.get("data") if run.config_file.is_file() else None
    if not config:
        return None
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
    return data if hasattr(data, "splits") else None


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name, None) if module else None
