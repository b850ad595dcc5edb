"""Distillation in one call."""

import inspect
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from kd_lightning.callbacks import FitSummary, RunSummary, StepCheckpoint, TensorBoardImages
from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.errors import UserError
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.modules.distillation import DistillationModule
from kd_lightning.runs.moved import describe_file
from kd_lightning.runs.run import BEST, LAST, LOGS, Run
from kd_lightning.runs.source import Source


def distill(
    student: nn.Module,
    teacher: nn.Module | Run | Checkpoint | str | PathLike[str],
    data: pl.LightningDataModule,
    *,
    name: str = "distill",
    ckpt_path: str | PathLike[str] | None = None,
    test: bool = True,
    **trainer_options: Any,
) -> Run:
    """Train a student on a teacher's outputs, test its best checkpoint, and return the run.

    It does what the commands ``fit`` and ``test`` do: checkpoints of the best and the last epoch, a stop on Ctrl-C that
    can be resumed, figures and images in TensorBoard, ``fit.json`` and ``test.json``, all in
    ``lightning_logs/NAME/version_N``. Data without test images are not tested.

    Args:
        student: Network to train, in place.
        teacher: A trained network, or a run, a recipe or a checkpoint, of which the (best) network is built.
        data: Data module; a data set of your own fits into :class:`~kd_lightning.DatasetDataModule`.
        name: Name of the runs, for ``Run.find(name)``.
        ckpt_path: Checkpoint of a run that was interrupted, for example ``run.last_file``, to resume it in its
            folder.
        test: Test the best checkpoint, once; ``False`` while settings are chosen, by ``run.fit["val"]``.
        **trainer_options: Arguments of :class:`lightning.pytorch.Trainer` (``max_epochs``, ``precision``, ...), and of
            :class:`~kd_lightning.DistillationModule` (``temperature``, ``losses``, ``learning_rate``, ...).

    Raises:
        MissingFileError: If there is no such run or checkpoint.
        UserError: If an option does not exist, or is needed to find the run again.

    Example:
        >>> import os, tempfile
        >>> from kd_lightning import DigitsDataModule
        >>> from kd_lightning.networks import ResNet
        >>> small = lambda width: ResNet([1], [width], in_channels=1)
        >>> options = dict(max_epochs=1, accelerator="cpu", teacher_check="off", enable_progress_bar=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = distill(
        ...         small(4), small(8), DigitsDataModule(), default_root_dir=folder, log_every_n_steps=5, **options
        ...     )  # doctest: +ELLIPSIS
        ...     0 <= run.test["accuracy"] <= 1, run.best.network(into=small(4)).training
        ┏...
        (True, False)
    """
    if not isinstance(data, pl.LightningDataModule):
        raise UserError(
            f"data must be a LightningDataModule, got {type(data).__name__}; wrap data sets in "
            "DatasetDataModule(train, val, test)."
        )
    module_options, options = _divide(trainer_options)
    network, files = _load_teacher(teacher)
    module = DistillationModule(student, network, **module_options)
    options.setdefault("logger", _logger(name, ckpt_path, options.get("default_root_dir")))
    options["callbacks"] = [*_callbacks(options.get("callbacks")), FitSummary(files), *_checkpoints()]
    trainer = pl.Trainer(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*directory .* exists and is not empty.*")  # of a run that is resumed
        trainer.fit(module, data, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    run = Run(str(trainer.log_dir))
    if not test:
        return run
    if _has_test(data):
        trainer.test(module, data, ckpt_path=str(run.best_file), weights_only=True)
    else:
        rank_zero_info("There are no test images, so the student is not tested.")
    return run


def _logger(name: str, ckpt_path: str | PathLike[str] | None, root: str | PathLike[str] | None) -> TensorBoardLogger:
    """Return the logger of a new run, or of the run that a checkpoint belongs to."""
    if ckpt_path is None:
        return TensorBoardLogger(Path(root or ".") / LOGS, name=name, default_hp_metric=False)
    folder = Path(ckpt_path).expanduser().parent.parent
    folder = folder if folder.name else folder.absolute()
    return TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)


def _divide(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the module, and those of the Trainer.

    Raises:
        UserError: If an option belongs to neither, or checkpoints are disabled.
    """
    of_module = [name for kind in (DistillationModule, ClassificationModule) for name in _keywords(kind)]
    of_trainer = _keywords(pl.Trainer)
    for name in options:
        if name not in of_module and name not in of_trainer:
            near = get_close_matches(name, [*of_module, *of_trainer], n=1)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise UserError(f"{name!r} is an option of neither DistillationModule nor Trainer{nearest}.")
    if options.get("enable_checkpointing") is False or options.get("barebones"):
        raise UserError(
            "distill returns a run with its best checkpoint, so leave out enable_checkpointing=False and barebones; "
            "without checkpoints, use DistillationModule and Trainer.fit."
        )
    module = {name: value for name, value in options.items() if name in of_module}
    return module, {name: value for name, value in options.items() if name not in of_module}


def _keywords(kind: type) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    return [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]


def _load_teacher(teacher: object) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Return the teacher's network, and the description of the file that it comes from."""
    if isinstance(teacher, nn.Module):
        return teacher, []
    if isinstance(teacher, Run):
        teacher = teacher.best
    if isinstance(teacher, Checkpoint):
        return teacher.network(), [describe_file(teacher.path)]
    if isinstance(teacher, str | PathLike):
        source = Source(Path(teacher))
        return source.network(), [describe_file(source.path)]
    raise UserError(f"teacher must be a network, a run or a checkpoint, got {type(teacher).__name__}.")


def _callbacks(given: object) -> list[pl.Callback]:
    """Return the callbacks that a user gives, and those that the command line adds, unless they are among these."""
    mine: list[pl.Callback] = list(given) if isinstance(given, list | tuple) else [given] if given else []  # type: ignore[list-item]
    kinds = {type(callback) for callback in mine}
    return [*mine, *(kind() for kind in (TensorBoardImages, RunSummary, StepCheckpoint) if kind not in kinds)]


def _checkpoints() -> list[ModelCheckpoint]:
    return [
        ModelCheckpoint(filename=BEST, monitor="val/accuracy", mode="max"),
        ModelCheckpoint(filename=LAST, enable_version_counter=False, save_on_train_epoch_end=True),
    ]


def _has_test(data: pl.LightningDataModule) -> bool:
    if not is_overridden("test_dataloader", data, pl.LightningDataModule):
        return False
    try:
        data.setup("test")
    except UserError:
        return False
    return True
