"""`kd-lightning fit|validate|test|predict`: LightningCLI, with its traps closed."""

import os
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import kd_lightning
from kd_lightning.callbacks import PredictionWriter, RunReport, TensorBoardImages
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.networks import read_checkpoint
from kd_lightning.recipes import recipe_files, recipe_names
from kd_lightning.runs import LOGS, newest_run, resolve_checkpoint, run_of


class ArgumentParser(LightningArgumentParser):
    """A parser that lets arguments be linked while a ``class_path`` names a function (jsonargparse 4.53 does not)."""

    def add_function_arguments(self, *args: Any, linked_targets: Any = None, **kwargs: Any) -> Any:
        """As in jsonargparse, without the keyword that it passes and does not take."""
        return super().add_function_arguments(*args, **kwargs)


class CommandLine(LightningCLI):
    """LightningCLI for the modules and data modules of this package, or a user's own.

    ``best`` and ``last`` are checkpoints of the run whose ``config.yaml`` is given, else of the newest run of the
    recipe; a test goes into the folder of the run that is tested. Flags override what a checkpoint says of its
    hyper-parameters.
    """

    def __init__(self) -> None:
        super().__init__(
            model_class=ClassificationModule,
            subclass_mode_model=True,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_data=True,
            parser_class=ArgumentParser,
            seed_everything_default=0,
            trainer_defaults={
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(LOGS), "name": "", "default_hp_metric": False},
                },
                "callbacks": [TensorBoardImages(), RunReport()],
            },
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is saved while training, and where predictions go."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
            }
        )
        parser.add_lightning_class_args(PredictionWriter, "predictions")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning lets a checkpoint's hyper-parameters override the command line here."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoints that were named, before anything is built."""
        self.options = self.config[self.config.subcommand]
        self._find_teacher()
        self._find_checkpoint()

    def _find_teacher(self) -> None:
        teacher = self.options.get("model.init_args.teacher")
        path = teacher.get("init_args.path") if teacher and hasattr(teacher, "get") else None
        if path is None:
            return
        name = "model.init_args.teacher.init_args.path"
        missing = None
        if not Path(path).is_file() and path in recipe_names():
            try:
                self.options[name] = str(resolve_checkpoint("best", newest_run(LOGS / path)))
                _say(f"The teacher is {self.options[name]}.")
            except FileNotFoundError:
                missing = f"There is no trained teacher yet; run `kd-lightning fit -c {path}` first"
        elif not Path(path).is_file():
            missing = f"There is no teacher's checkpoint {str(path)!r}"
        if missing and self.config.subcommand == "fit":
            raise FileNotFoundError(f"{missing}, or name its checkpoint with --teacher FILE.")
        if missing:
            self.options["model.init_args.teacher"] = None
            _say(f"{missing}; agreement with the teacher is left out.")

    def _find_checkpoint(self) -> None:
        which, fits = self.options.get("ckpt_path"), self.config.subcommand == "fit"
        pretrained = str(self.options.get("model.init_args.network.class_path", "")).endswith("from_checkpoint")
        if which is None and (fits or pretrained):
            return
        which = "best" if which is None else str(which)
        path = resolve_checkpoint(which, self._run()) if which in ("best", "last") else Path(which)
        if not path.is_file():
            raise FileNotFoundError(f"There is no checkpoint {which!r}; give a file, best or last to --ckpt_path.")
        read_checkpoint(path)  # Lightning compares no checksum, and tells a damaged file in many lines
        self.options["ckpt_path"] = str(path)
        _say(f"The checkpoint is {path}.")
        run = run_of(path)
        if not fits or run is not None:
            self.save_config_callback = None  # the run's own config.yaml stays as it was
        if run is not None and "save_dir" in self.options.get("trainer.logger.init_args", {}):
            place = {"save_dir": str(run.parent), "name": "", "version": run.name}
            for name, value in place.items():
                self.options[f"trainer.logger.init_args.{name}"] = value

    def _run(self) -> Path:
        for config in reversed(self.options.get("config") or []):
            folder = Path(str(config)).parent
            if (folder / "checkpoints").is_dir():
                return folder
        logger = self.options.get("trainer.logger.init_args") or {}
        return newest_run(Path(logger.get("save_dir", LOGS), logger.get("name") or ""))

    def after_fit(self) -> None:
        """Name the best checkpoint."""
        best = next((c for c in self.trainer.checkpoint_callbacks if getattr(c, "best_model_path", "")), None)
        if isinstance(best, ModelCheckpoint) and best.best_model_score is not None:
            _say(f"The best checkpoint is {best.best_model_path} ({best.monitor} {float(best.best_model_score):.4f}).")

    def after_predict(self) -> None:
        """Name the file."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter) and callback.written:
                _say(f"The predictions are in {callback.written}.")


def run() -> None:
    """Run a command of LightningCLI on ``sys.argv``; the errors that users make end it with one sentence."""
    command = sys.argv[1]
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own affair with torch
    # a run that goes on, or is tested, writes into its own folder on purpose
    warnings.filterwarnings("ignore", ".*(Checkpoint directory .* exists and is not empty|The dirpath has changed).*")
    try:
        sys.argv[1:] = list(_expanded(sys.argv[1:]))
        CommandLine()
    except Exception as error:
        cause = _innermost(error)
        if not _is_ours(cause) or os.environ.get("KD_LIGHTNING_TRACEBACK"):
            raise
        sys.exit(f"kd-lightning {command}: {cause}")


def _expanded(arguments: list[str]) -> Iterator[str]:
    """Recipes by name become files, and ``--teacher`` the path of the teacher's checkpoint."""
    arguments = _with_config(arguments)
    last: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, joined, value = argument.partition("=")
        if flag not in ("-c", "--config", "--teacher"):
            yield argument
            continue
        value = value if joined else next(rest, "")
        if flag == "--teacher":
            last.append(f"--model.teacher.path={value}")
        elif Path(value).is_file():
            yield from ("-c", value)
        elif (config := _trained_config(value, arguments)) is not None:
            yield from ("-c", str(config))
        else:
            for file in recipe_files(value):
                yield from ("-c", str(file))
            yield f"--trainer.logger.init_args.name={value}"
    yield from last


def _trained_config(recipe: str, arguments: list[str]) -> Path | None:
    """After ``fit``: the configuration with which the newest run of a recipe was trained, flags included."""
    if arguments[0] == "fit" or _value_of("--ckpt_path", arguments) not in (None, "best", "last"):
        return None
    try:
        config = newest_run(LOGS / recipe) / "config.yaml"
    except FileNotFoundError:
        return None
    return config if config.is_file() else None


def _value_of(flag: str, arguments: list[str]) -> str | None:
    joined = [argument.removeprefix(f"{flag}=") for argument in arguments if argument.startswith(f"{flag}=")]
    return next(iter(joined + [value for name, value in pairwise(arguments) if name == flag]), None)


def _with_config(arguments: list[str]) -> list[str]:
    """A checkpoint alone brings the ``config.yaml`` of its run."""
    flags = {argument.partition("=")[0] for argument in arguments}
    if arguments[0] == "fit" or flags & {"-c", "--config", "-h", "--help", "--model", "--print_config"}:
        return arguments
    checkpoint = _value_of("--ckpt_path", arguments)
    run = None if checkpoint is None else run_of(Path(checkpoint))
    if run is None:
        raise ValueError("No model is named; add -c with a recipe or the config.yaml of a run.")
    _say(f"The configuration is {run / 'config.yaml'}.")
    return [arguments[0], "-c", str(run / "config.yaml"), *arguments[1:]]


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not _is_ours(error):
        error = error.__cause__
    return error


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it itself, as a sentence for the user."""
    if not isinstance(error, ValueError | OSError) or error.__traceback__ is None:
        return False
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(kd_lightning.__file__).parent)
