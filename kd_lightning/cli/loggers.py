"""Loggers that a command is given: their packages, and the folder of the run, which some of them do not have."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import Namespace, dict_to_namespace

from kd_lightning.checkpoints.trust import resolve
from kd_lightning.errors import UserError, first_line
from kd_lightning.runs.run import LOGS

_PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml"}
"""Packages that Lightning's loggers need."""
_WRITERS = ("TensorBoardLogger", "CSVLogger")
"""Loggers whose folder is that of the run."""
_NAME = "--trainer.logger.init_args.name="


def check_packages(options: Namespace) -> None:
    """Make sure that the packages of all loggers are installed.

    Args:
        options: Options of the command.

    Raises:
        UserError: If one is not.
    """
    for logger in _loggers(options):
        name = _class_name(logger)
        package = _PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise UserError(
                f"{name} needs the package {package.replace('_', '-')}, which is not installed; run "
                f"`pip install {package.replace('_', '-')}`, or choose another logger."
            )


def keep_run_folder(options: Namespace, words: Sequence[str]) -> Iterator[str]:
    """Put a ``TensorBoardLogger`` before loggers that have no folder for the run; store MLflow's runs in a data base.

    Args:
        options: Options of the command, which are changed.
        words: Words of the command line, which contain the recipe's name.

    Yields:
        Sentences that report what was added.
    """
    loggers = _loggers(options)
    for logger in loggers:
        if _class_name(logger) == "MLFlowLogger" and logger.get("init_args.tracking_uri") is None:
            LOGS.mkdir(exist_ok=True)
            logger["init_args.tracking_uri"] = f"sqlite:///{LOGS / 'mlflow.db'}"  # it refuses to write plain files
            yield f"MLflow's runs are in {LOGS / 'mlflow.db'}, as tracking_uri is not given."
    if loggers and not any(has_run_folder(logger) for logger in loggers):
        name = next((word.removeprefix(_NAME) for word in reversed(words) if word.startswith(_NAME)), "")
        arguments = {"save_dir": str(LOGS), "name": name, "default_hp_metric": False}
        path = "lightning.pytorch.loggers.TensorBoardLogger"
        first = dict_to_namespace({"class_path": path, "init_args": arguments})
        options["trainer.logger"] = [first, *loggers]
        yield f"A TensorBoardLogger writes the folder of the run beside {_class_name(loggers[0])}."


def has_run_folder(logger: object) -> bool:
    """Return whether a logger's folder is that of the run, so that it can be named by ``save_dir`` and ``version``."""
    if not isinstance(logger, Namespace) or _class_name(logger) in _PACKAGES:
        return False
    arguments = logger.get("init_args") or {}
    return _class_name(logger).endswith(_WRITERS) or {"save_dir", "name", "version"} <= set(arguments)


def write_below(root: str, options: Namespace) -> None:
    """Let loggers that write into the default folder write below another one."""
    for logger in _loggers(options):
        if logger.get("init_args.save_dir") == str(LOGS):  # our default, which the user's replaces
            logger["init_args.save_dir"] = str(Path(root, LOGS))


def explain_logger_error(options: Namespace) -> str | None:
    """Return why a logger cannot be built, which jsonargparse does not say of one in a list; ``None`` if all can."""
    for logger in _loggers(options):
        kind = resolve(logger.get("class_path"))
        try:
            if callable(kind):
                arguments = logger.get("init_args")
                kind(**(vars(arguments) if arguments else {}))
        except Exception as error:
            return f"{_class_name(logger)} cannot be built: {first_line(error)}."
    return None


def _loggers(options: Namespace) -> list[Namespace]:
    given = options.get("trainer.logger")
    return [each for each in (given if isinstance(given, list) else [given]) if isinstance(each, Namespace)]


def _class_name(logger: Namespace) -> str:
    return str(logger.get("class_path")).rpartition(".")[2]
