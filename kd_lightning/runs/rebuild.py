"""The network of a checkpoint, and images of the run that made it."""

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
from kd_lightning.runs.run import configuration, run_of


def load_network(checkpoint: Path) -> nn.Module:
    """The network that a checkpoint of the command line holds, with its weights and ``data_config``, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of this package, or was saved from Python.
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


def images_of_run(checkpoint: Path, split: str, count: int) -> Tensor | None:
    """As :func:`labelled_images_of_run`, without the labels."""
    shown = labelled_images_of_run(checkpoint, split, count)
    return None if shown is None else shown[0]


def labelled_images_of_run(checkpoint: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor] | None:
    """Images of a run's data, as they are: floats in [0, 1], ``(N, channels, H, W)`` with N up to ``count``; labels.

    Args:
        checkpoint: Beside whose folder the run's ``config.yaml`` lies.
        split: ``"train"``, which is shuffled, ``"val"`` or ``"test"``.
        count: How many; ``None`` for all.

    Returns:
        ``(N, channels, H, W)`` and ``(N,)``, or ``None`` where the checkpoint lies in no run, or the run's data are not
        there any more.
    """
    data = data_of_run(checkpoint)
    if data is None:
        return None
    part = getattr(data, "target", data)  # of a pair, where the network is used
    try:
        part.prepare_data()
        part.setup("test" if split == "test" else "fit")
    except OSError:
        return None
    shown: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in getattr(part, f"{split}_dataloader")():
        pixels = part.pixels(batch._replace(epoch=-1)).float() / 255
        shown.append(with_channels(resize(pixels, data.image_shape[1:]), data.image_shape[0]))
        labels.append(batch.labels)
        if count is not None and sum(map(len, shown)) >= count:
            break
    return torch.cat(shown)[:count], torch.cat(labels)[:count]


def data_of_run(checkpoint: Path) -> Any:
    """The data module of the ``config.yaml`` beside a checkpoint, not set up; ``None`` if there is none of ours.

    Raises:
        ValueError: If it cannot be made, for example because its class cannot be imported.
    """
    run = run_of(checkpoint)
    config = configuration(run) if run is not None else {}
    if run is None or not config.get("data"):
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    except (ArgumentError, ValueError) as error:
        text = " ".join(str(error).split())
        reason = (text.partition("Errors: - ")[2] or text).partition(" - Expected a <")[0][:300].rstrip(".")
        raise UserError(
            f"The data of {str(run / 'config.yaml')!r} cannot be made ({reason}); correct that, or make it importable."
        ) from error
    return data if hasattr(data, "splits") else None


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name, None) if module else None
