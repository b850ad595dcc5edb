"""Which run and which checkpoint the options of a command mean."""

from contextlib import suppress
from pathlib import Path

from jsonargparse import Namespace

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.trust import check_trusted_classes, is_from_checkpoint
from kd_lightning.cli.echo import echo
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.runs.run import BEST, LAST, LOGS, Run


def choose_checkpoint(options: Namespace, command: str) -> Checkpoint | None:
    """Open the checkpoint that ``--ckpt_path`` means; return ``None`` if none is to be loaded.

    Args:
        options: Options of the command.
        command: For example ``"fit"``, which starts without a checkpoint unless one is named.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is damaged or names classes that are not trusted.
    """
    which = options.get("ckpt_path")
    if which is None:
        if command == "fit":
            if options.get("trust"):
                raise UserError("--trust is about what a checkpoint names, and fit starts from none; leave it out.")
            return None
        if _is_pretrained(options) and configured_run(options) is None:
            echo("The weights are those that the network is built with; name a run's checkpoint with --ckpt_path.")
            return None
        which = BEST
    opened = _newest(options) if str(which) == "auto" else Checkpoint.of_run(_named(str(which), options))
    if opened is None:
        echo("There is no checkpoint to resume from, so the run starts from the beginning.")
        return None
    if not options.get("trust"):
        check_trusted_classes(opened.hyper_parameters, str(opened.path))
    echo(f"The checkpoint is {opened.path}.")
    return opened


def configured_run(options: Namespace) -> Run | None:
    """Return the run that wrote the last of the configurations that a run wrote."""
    files = [str(config) for config in options.get("config") or [] if config is not None]  # None: text of a recipe
    runs = [Run(Path(file).parent) for file in reversed(files)]
    return next((run for run in runs if run.has_checkpoints), None)


def _run(options: Namespace) -> Run:
    run = configured_run(options)
    if run is not None:
        return run
    logger = options.get("trainer.logger")
    if not logger:  # Lightning writes into its root folder itself
        return Run(options.get("trainer.default_root_dir") or ".")
    first = logger[0] if isinstance(logger, list) else logger
    logger = (first.get("init_args") if isinstance(first, Namespace) else None) or {}
    folder = Path(logger.get("save_dir", LOGS), logger.get("name") or "")
    version = logger.get("version")
    if version is None:
        return Run.newest_of(folder)
    return Run(folder / (version if isinstance(version, str) else f"version_{version}"))


def _named(which: str, options: Namespace) -> Path:
    path = _run(options).checkpoint(which) if which in (BEST, LAST) else Path(which).expanduser()
    if not path.is_file():
        raise MissingFileError(f"There is no checkpoint {which!r}; give a file, best, last or auto to --ckpt_path.")
    return path


def _newest(options: Namespace) -> Checkpoint | None:
    with suppress(MissingFileError):
        return _run(options).newest_checkpoint(lambda reason: echo(f"Skipped: {reason}"))
    return None


def _is_pretrained(options: Namespace) -> bool:
    return is_from_checkpoint(options.get("model.init_args.network.class_path"))
