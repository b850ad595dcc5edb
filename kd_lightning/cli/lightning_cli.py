"""`kd-lightning fit|validate|test|predict|layers`: LightningCLI for this package's modules and data."""

import signal
import sys
import warnings
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.callbacks import (
    FeatureWriter,
    FitSummary,
    LineProgress,
    PredictionWriter,
    RunSummary,
    StepCheckpoint,
    TensorBoardImages,
)
from kd_lightning.callbacks.label_results import named_label_results
from kd_lightning.callbacks.run_cost import describe_cost
from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.io import use_atomic_checkpoints
from kd_lightning.checkpoints.trust import class_paths, imported_packages
from kd_lightning.cli.arguments import expand_arguments
from kd_lightning.cli.checkpoint_choice import choose_checkpoint, configured_run
from kd_lightning.cli.class_count import count_classes
from kd_lightning.cli.class_table import print_class_table, print_label_table
from kd_lightning.cli.device_options import (
    choose_accelerator,
    choose_precision,
    drop_advertisements,
    set_matmul_precision,
)
from kd_lightning.cli.download_errors import explain_download_error
from kd_lightning.cli.echo import echo
from kd_lightning.cli.errors import exit_on_error, innermost_cause, one_line
from kd_lightning.cli.image_folders import data_root, find_images
from kd_lightning.cli.layers import print_layers
from kd_lightning.cli.loggers import check_packages, explain_logger_error, has_run_folder, keep_run_folder, write_below
from kd_lightning.cli.network_arguments import write_networks
from kd_lightning.cli.parse_errors import explain_parse_errors
from kd_lightning.cli.plain_warnings import show_plain_warnings
from kd_lightning.cli.sources import echo_imported
from kd_lightning.cli.teacher_files import find_teacher, leave_out_downloads, teacher_paths
from kd_lightning.cli.trainer_errors import explain_device_error, explain_trainer_errors
from kd_lightning.errors import UserError, find_cause
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.networks.data_config import data_config, set_data_config
from kd_lightning.networks.published_config import named_weights
from kd_lightning.runs.moved import describe_file, describe_images
from kd_lightning.runs.run import BEST, LAST, LOGS, Run

_BUILD_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, MisconfigurationException)
"""What classes raise for arguments that they do not take."""


class CommandLine(LightningCLI):
    """LightningCLI for the modules and data modules of this package, or a user's own.

    ``best`` and ``last`` are checkpoints of the run whose ``config.yaml`` is given, else of the newest run of the
    recipe; a test writes into the folder of the run that is tested. Flags override a checkpoint's hyper-parameters.

    Args:
        run: Run the command that ``sys.argv`` names; otherwise build the objects only, for ``layers``.
    """

    def __init__(self, *, run: bool = True) -> None:
        self.lists_layers = not run
        self.parsers: list[LightningArgumentParser] = []
        self.opened: Checkpoint | None = None
        parsing = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            model_class=ClassificationModule,
            subclass_mode_model=True,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(LOGS), "name": "", "default_hp_metric": False},
                },
                # `last` comes after the callback that saves the best, so that its file contains that one's state
                "callbacks": [TensorBoardImages(), RunSummary(), FitSummary(), _save_last_epoch()],
            },
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs=parsing if not run else {**parsing, **{name: dict(parsing) for name in self.subcommands()}},
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is saved while training, and where predictions go."""
        self.parsers.append(parser)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": BEST,
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
            }
        )
        parser.add_argument("--tf32", type=bool, default=True, help="On a GPU, multiply float32 matrices in TF32.")
        parser.add_argument(
            "--auto_precision",
            type=bool,
            default=False,
            help="Where trainer.precision is not given, compute in the fastest mixed precision of the hardware.",
        )
        parser.add_lightning_class_args(StepCheckpoint, "progress")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(FeatureWriter, "features")
        if not self.lists_layers:
            parser.add_argument("--trust", action="store_true", help="Import whatever the checkpoint names.")
        else:
            parser.add_argument("--image_shape", type=list[int] | None, default=None, help="[C, H, W] of an image.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line; report mistakes in one sentence."""
        with explain_parse_errors(self.parsers):
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing, where Lightning lets a checkpoint's hyper-parameters override the command line.

        LightningCLI calls it in its constructor and offers no option or public hook to leave it out.
        """

    def before_instantiate_classes(self) -> None:
        """Find the checkpoints that are named, before anything is built."""
        self.command = self.config.get("subcommand") or "layers"
        self.options = self.config.get(self.command, self.config)
        run = configured_run(self.options)
        if run is not None:
            echo_imported(str(run.config_file), imported_packages(class_paths(run.configuration, strings=False)))
        self._prepare_trainer()
        evaluated = run or _run_of_checkpoint(self.options.get("ckpt_path"))
        for line in find_teacher(self.options.get("model.init_args"), self.command, evaluated):
            echo(line)
        for line in find_images(self.options, evaluated):
            echo(line)
        if self.command != "layers":
            self.options["weights_only"] = True  # read files as data; Lightning's default runs the code in them
            self.opened = choose_checkpoint(self.options, self.command)
            del self.options["trust"]  # config.yaml does not keep it
            if self.opened is not None and self.command != "fit":
                leave_out_downloads(self.options.get("model.init_args"))
            self._use_folder_of(self.opened)

    def _prepare_trainer(self) -> None:
        """Adapt callbacks, devices and loggers to this machine and its output."""
        callbacks = self.options.get("trainer.callbacks")
        if isinstance(callbacks, list):  # of a run that the same command resumes, which added them before
            self.options["trainer.callbacks"] = [c for i, c in enumerate(callbacks) if c not in callbacks[:i]]
        accelerator = self.options.get("trainer.accelerator", "auto")
        if (chosen := choose_accelerator(accelerator)) != accelerator:
            self.options["trainer.accelerator"] = chosen
            echo("Apple's MPS is not supported, so this runs on the CPU.")
        if self.options.get("trainer.enable_checkpointing") is False:
            self._drop_checkpoint_callbacks()
        if not sys.stdout.isatty() and self.options.get("trainer.enable_progress_bar") is not False:
            self._print_lines_of_progress(callbacks)
        if self.command != "layers":
            check_packages(self.options)
            for line in keep_run_folder(self.options, sys.argv):
                echo(line)
        if (root := self.options.get("trainer.default_root_dir")) is not None:
            write_below(root, self.options)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer as LightningCLI does, with a precision that is chosen for the hardware if that is wanted.

        It is not written into the configuration, so that another machine chooses its own.
        """
        if self.options.get("auto_precision") and self.options.get("trainer.precision") is None:
            options = [self.options.get(f"trainer.{name}", "auto") for name in ("accelerator", "devices", "strategy")]
            kwargs["precision"] = choose_precision(*options)
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Build what the configuration names; report in one sentence what a class does not accept.

        Raises:
            ValueError: If a class does not accept its arguments.
        """
        try:
            super().instantiate_classes()
        except _BUILD_ERRORS as error:
            if find_cause(error, UserError) is not None:
                raise
            cause = innermost_cause(error)
            known = explain_device_error(str(cause)) or explain_download_error(error)
            if known is None and "subclass of Logger" in str(cause):
                known = explain_logger_error(self.options)
            sentence = known or f"The configuration cannot be built: {one_line(cause)}"
            raise UserError(sentence) from error
        self._attach_published_configs()
        if self.command == "fit":
            self._describe_sources()
        use_atomic_checkpoints(self.trainer.strategy, self.opened)
        self.opened = None
        if self.options.tf32:
            set_matmul_precision(self.trainer)

    @rank_zero_only
    def _describe_sources(self) -> None:
        """Record the digests of the teacher's files and of the folder of images, by which they are found again."""
        root = data_root(self.options)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FitSummary):
                paths = teacher_paths(self.options.get("model.init_args"))
                callback.teachers = [describe_file(path) for path in paths]
                callback.images = None if root is None or not root.is_dir() else describe_images(root)

    def _attach_published_configs(self) -> None:
        """Attach what the weights of torchvision expect that the configuration names: its networks do not keep it.

        What a checkpoint says of the network comes first: images are then read once, for its sizes.
        """
        if self.opened is not None and self.command != "fit" and self.opened.is_run:
            set_data_config(self.model.network, self.opened.data_config)
        arguments = self.options.get("model.init_args") or {}
        for argument, network in (
            (self.model.network_argument, self.model.network),
            ("teacher", getattr(self.model, "teacher", None)),
        ):
            node = arguments.get(argument)
            if network is None or node is None or data_config(network).mean is not None:
                continue
            published = named_weights(node)
            if published.mean is not None:
                names = published.classes if str(node.get("class_path")).startswith("torchvision.") else None
                set_data_config(network, published._replace(classes=names))

    def after_fit(self) -> None:
        """Print what the training cost, the path of the best checkpoint, and the next command."""
        teacher = getattr(self.model, "teacher", None)
        role = "student" if self.model.network_argument == "student" else "network"
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FitSummary):
                echo(describe_cost(callback.cost, has_teacher=teacher is not None, student=role))
        best = next((c for c in self.trainer.checkpoint_callbacks if getattr(c, "best_model_path", "")), None)
        if isinstance(best, ModelCheckpoint) and best.best_model_score is not None:
            echo(f"The best checkpoint is {best.best_model_path} ({best.monitor} {float(best.best_model_score):.4f}).")
            run = Run.of_checkpoint(best.best_model_path)
            if run is not None:
                echo(f"Next: kd-lightning test -c {run.folder}")

    def after_validate(self) -> None:
        """Print the result of each class."""
        if getattr(self.model, "label_scores", None) is not None:
            print_label_table(named_label_results(self.model, self.datamodule))
        confusion = getattr(self.model, "confusion", None)
        if confusion is not None:
            names = getattr(self.datamodule, "classes", None) or range(len(confusion))
            print_class_table(confusion, list(map(str, names)))

    def after_test(self) -> None:
        """Print the result of each class."""
        self.after_validate()

    def after_predict(self) -> None:
        """Print the paths of the files that were written; report images that are broken as an error.

        Raises:
            UserError: If images could not be read; the others were predicted.
        """
        left_out: list[str] = []
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter) and callback.written:
                echo(f"The predictions are in {callback.written}.")
            if isinstance(callback, FeatureWriter) and callback.written:
                echo(f"The features are in {callback.written}.")
            if isinstance(callback, PredictionWriter) and callback.left_out:
                left_out = [f"{len(callback.left_out)} of {callback.count} images are left out.", *callback.left_out]
        if left_out:
            raise UserError("\n".join(left_out))

    def _use_folder_of(self, checkpoint: Checkpoint | None) -> None:
        """Start from a checkpoint, and write into the folder of its run."""
        self.options["ckpt_path"] = None if checkpoint is None else str(checkpoint.path)
        run = None if checkpoint is None else Run.of_checkpoint(checkpoint.path)
        if (checkpoint is not None and self.command != "fit") or run is not None:
            self.save_config_callback = None  # the run's own config.yaml stays unchanged
        logger = self.options.get("trainer.logger")
        for each in logger if isinstance(logger, list) else [logger]:
            arguments = (each.get("init_args") if isinstance(each, Namespace) else None) or {}
            if run is not None and has_run_folder(each):
                place = {"save_dir": str(run.folder.parent), "name": "", "version": run.folder.name}
                for name, value in place.items():
                    arguments[name] = value
                if str(each.class_path).endswith("CSVLogger"):
                    _keep_metrics(run.folder / "metrics.csv")

    def _print_lines_of_progress(self, callbacks: object) -> None:
        """Replace Lightning's bar, which leaves nothing in a file until the end, unless a bar is chosen."""
        chosen = [str(each.get("class_path")) for each in callbacks] if isinstance(callbacks, list) else []
        if not any(name.endswith("ProgressBar") for name in chosen):
            self.trainer_defaults["callbacks"] = [*self.trainer_defaults["callbacks"], LineProgress()]

    def _drop_checkpoint_callbacks(self) -> None:
        """Leave out what saves checkpoints, which Lightning rejects beside ``enable_checkpointing=False``."""
        callbacks = self.trainer_defaults["callbacks"]
        self.trainer_defaults["callbacks"] = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        for parser in self.parsers:
            parser.callback_keys = [key for key in parser.callback_keys if key not in ("checkpoint", "progress")]


def _run_of_checkpoint(path: object) -> Run | None:
    return Run.of_checkpoint(str(path)) if path is not None and Path(str(path)).is_file() else None


@rank_zero_only
def _keep_metrics(file: Path) -> None:
    """Rename the metrics of a run, which Lightning's CSVLogger would delete before it writes into the same folder."""
    if file.is_file():
        kept = next(name for n in count() if not (name := file.with_stem(f"{file.stem}_{n}")).exists())
        file.rename(kept)
        echo(f"The metrics so far are in {kept}.")


def _count_classes(words: list[str]) -> int | None:
    """Return the number of classes of the data; commands that need a trained run first report that it is missing."""
    with suppress(*(() if words[0] in ("fit", "layers") else (UserError,))):
        return count_classes(words)
    return None


def _save_last_epoch() -> ModelCheckpoint:
    return ModelCheckpoint(filename=LAST, enable_version_counter=False, save_on_train_epoch_end=True)


def run(command_line: type[CommandLine] = CommandLine) -> None:
    """Run a command of LightningCLI on ``sys.argv``.

    Args:
        command_line: Class of the command line, for scripts that add hooks.
    """
    command = sys.argv[1]
    _silence_lightning()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # until StepCheckpoint handles it
    try:
        with exit_on_error(command, MisconfigurationException), explain_trainer_errors():
            words = list(expand_arguments(sys.argv[1:]))
            sys.argv[1:] = write_networks(words, partial(_count_classes, words))
            if command == "layers":
                del sys.argv[1]
                cli = command_line(run=False)
                print_layers(cli.model, cli.datamodule, cli.options.image_shape)
            else:
                command_line()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits with 1
            sys.exit(128 + signal.SIGINT)
        raise


def _silence_lightning() -> None:
    drop_advertisements()
    show_plain_warnings()
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's use of torch's pytree
    warnings.filterwarnings("ignore", ".*is not supported by the model summary.*")  # of mixed precisions
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")  # of few photographs
    # a run that is resumed or tested writes into its own folder on purpose
    warnings.filterwarnings("ignore", ".*(directory .* exists and is not empty|The dirpath has changed).*")
    # a test needs the averaged weights only, which are in the checkpoint
    warnings.filterwarnings("ignore", ".*using the WeightAveraging callback, but loading a checkpoint.*")
