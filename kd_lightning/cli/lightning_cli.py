"""`kd-lightning fit|validate|test|predict|layers`: LightningCLI, with its traps closed."""

import os
import signal
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import kd_lightning
from kd_lightning.callbacks import FeatureWriter, PredictionWriter, RunSummary, StepCheckpoint, TensorBoardImages
from kd_lightning.checkpoints.trust import check_trusted_classes
from kd_lightning.cli.arguments import expanded
from kd_lightning.cli.device_options import (
    choose_accelerator,
    drop_advertisements,
    explain_device_error,
    set_matmul_precision,
)
from kd_lightning.cli.teacher_files import find_teacher
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.features import layer_shapes
from kd_lightning.files.read import read_checkpoint
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.networks.dry_run import try_forward
from kd_lightning.runs.run import BEST, LAST, LOGS, Run


def _last() -> ModelCheckpoint:
    """Saves each epoch's end; the one that saves the best comes before it, so that its state is in the file."""
    return ModelCheckpoint(filename="last", enable_version_counter=False, save_on_train_epoch_end=True)


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

    def __init__(self, run: bool = True) -> None:
        self.lists_layers = not run
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
                "callbacks": [TensorBoardImages(), RunSummary()],
            },
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is saved while training, and where predictions go."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
            }
        )
        parser.add_argument("--tf32", type=bool, default=True, help="On a GPU, multiply float32 matrices in TF32.")
        parser.add_lightning_class_args(StepCheckpoint, "progress")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(FeatureWriter, "features")
        if self.lists_layers:
            parser.add_argument("--image_shape", type=list[int] | None, default=None, help="[C, H, W] of an image.")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning lets a checkpoint's hyper-parameters override the command line here."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoints that were named, before anything is built."""
        self.command = self.config.get("subcommand") or "layers"
        self.options = self.config.get(self.command, self.config)
        callbacks = self.options.get("trainer.callbacks")
        if isinstance(callbacks, list):  # of a run that goes on by the same command, which added them before
            self.options["trainer.callbacks"] = [c for i, c in enumerate(callbacks) if c not in callbacks[:i]]
        accelerator = self.options.get("trainer.accelerator", "auto")
        if (chosen := choose_accelerator(accelerator)) != accelerator:
            self.options["trainer.accelerator"] = chosen
            _say("Apple's MPS is not supported, so this runs on the CPU.")
        for line in find_teacher(self.options.get("model.init_args"), self.command):
            _say(line)
        if self.command != "layers":
            self.options["weights_only"] = True  # files are read as data; Lightning's default is to run what is in them
            self._find_checkpoint()

    def instantiate_classes(self) -> None:
        """Build what the configuration names; what a class of another package says against its arguments is told."""
        try:
            super().instantiate_classes()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, MisconfigurationException) as error:
            cause = _innermost(error)
            if _is_ours(cause):
                raise
            sentence = explain_device_error(str(cause)) or f"The configuration cannot be built: {_sentence(cause)}"
            raise UserError(sentence) from error
        if self.options.tf32:
            set_matmul_precision(self.trainer)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        """Save the last epoch as well, or nothing where no checkpoints are wanted."""
        callbacks = [*callbacks, _last()]
        if config.get("enable_checkpointing") is False:  # Lightning refuses a ModelCheckpoint then
            callbacks = [
                callback for callback in callbacks if not isinstance(callback, ModelCheckpoint | StepCheckpoint)
            ]
        return super()._instantiate_trainer(config, callbacks)

    def _find_checkpoint(self) -> None:
        which, fits = self.options.get("ckpt_path"), self.command == "fit"
        pretrained = str(self.options.get("model.init_args.network.class_path", "")).endswith("from_checkpoint")
        if which is None and fits:
            return
        if which is None and pretrained and self._configured_run() is None:
            _say("The weights are those that the network is built with; those of a run are named by --ckpt_path.")
            return
        which = BEST if which is None else str(which)
        if which == "auto":
            which = self._newest_checkpoint()
        if which is None:
            self.options["ckpt_path"] = None
            _say("There is no checkpoint to go on from, so the run begins anew.")
            return
        path = self._run().checkpoint(which) if which in (BEST, LAST) else Path(which)
        if not path.is_file():
            raise MissingFileError(f"There is no checkpoint {which!r}; give a file, best, last or auto to --ckpt_path.")
        content = read_checkpoint(path)  # Lightning compares no checksum, and tells a damaged file in many lines
        check_trusted_classes(content.get("hyper_parameters"), str(path))
        self.options["ckpt_path"] = str(path)
        _say(f"The checkpoint is {path}.")
        run = Run.of_checkpoint(path)
        if not fits or run is not None:
            self.save_config_callback = None  # the run's own config.yaml stays as it was
        if run is not None and "save_dir" in self.options.get("trainer.logger.init_args", {}):
            place = {"save_dir": str(run.folder.parent), "name": "", "version": run.folder.name}
            for name, value in place.items():
                self.options[f"trainer.logger.init_args.{name}"] = value

    def _newest_checkpoint(self) -> str | None:
        with suppress(MissingFileError):
            found = self._run().newest_checkpoint(lambda reason: _say(f"Skipped: {reason}"))
            return None if found is None else str(found)
        return None

    def _configured_run(self) -> Run | None:
        """Return the run that wrote one of the configurations."""
        runs = [Run(Path(str(config)).parent) for config in reversed(self.options.get("config") or [])]
        return next((run for run in runs if run.has_checkpoints), None)

    def _run(self) -> Run:
        if (run := self._configured_run()) is not None:
            return run
        logger = self.options.get("trainer.logger.init_args") or {}
        runs = Path(logger.get("save_dir", LOGS), logger.get("name") or "")
        version = logger.get("version")
        if version is None:
            return Run.newest_of(runs)
        return Run(runs / (version if isinstance(version, str) else f"version_{version}"))

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
            if isinstance(callback, FeatureWriter) and callback.written:
                _say(f"The features are in {callback.written}.")


def _print_layers(cli: CommandLine) -> None:
    """The layers of a configuration's networks, by the names that losses take, and their shapes for one image."""
    shape = cli.options.image_shape or getattr(cli.datamodule, "image_shape", None)
    if shape is None:
        raise UserError("The data do not tell the shape of their images; add --image_shape '[3, 32, 32]'.")
    for role in ("network", "teacher"):
        network = getattr(cli.model, role, None)
        if network is not None:
            images = torch.zeros(2, *shape)
            shapes = try_forward(network, partial(layer_shapes, network, images), f"The {role}", images)
            width = max(map(len, shapes))
            print(f"{cli.model.network_argument if role == 'network' else role}: {type(network).__name__}")
            print("\n".join(f"  {name:<{width}}  {tuple(size[1:])}" for name, size in shapes.items()))


def run() -> None:
    """Run a command of LightningCLI on ``sys.argv``; the errors that users make end it with one sentence."""
    command = sys.argv[1]
    drop_advertisements()
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own affair with torch
    # a run that goes on, or is tested, writes into its own folder on purpose
    warnings.filterwarnings("ignore", ".*(Checkpoint directory .* exists and is not empty|The dirpath has changed).*")
    # a test needs the averaged weights alone, which are in the checkpoint
    warnings.filterwarnings("ignore", ".*using the WeightAveraging callback, but loading a checkpoint.*")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # until a fit takes it over
    try:
        sys.argv[1:] = list(expanded(sys.argv[1:]))
        if command == "layers":
            del sys.argv[1]
            _print_layers(CommandLine(run=False))
        else:
            CommandLine()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # which Lightning ends with 1
            sys.exit(128 + signal.SIGINT)
        raise
    except Exception as error:
        if getattr(error, "__notes__", None):
            sys.exit(f"kd-lightning {command}: {error.__notes__[-1]}")
        cause = _innermost(error)
        if not (_is_ours(cause) or _is_lightnings(cause)) or os.environ.get("KD_LIGHTNING_TRACEBACK"):
            raise
        sys.exit(f"kd-lightning {command}: {_sentence(cause)}")


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not _is_ours(error):
        error = error.__cause__
    return error


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it itself, as a sentence for the user."""
    return isinstance(error, ValueError | OSError) and _raised_in(kd_lightning, error)


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning refuses what it was told."""
    return isinstance(error, MisconfigurationException) or (
        isinstance(error, ValueError) and _raised_in(lightning, error)
    )


def _raised_in(package: ModuleType, error: BaseException) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    folder = Path(str(package.__file__)).parent
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(folder)


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
