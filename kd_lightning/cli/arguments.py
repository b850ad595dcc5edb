"""Short forms of arguments, written out for LightningCLI."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import yaml

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.described import saved_configuration
from kd_lightning.checkpoints.trust import imported_packages
from kd_lightning.cli.echo import echo
from kd_lightning.cli.sources import echo_imported
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.recipes import recipe_names, recipe_texts
from kd_lightning.runs.run import BEST, CONFIG, LAST, LOGS, Run


def expand_arguments(arguments: list[str]) -> Iterator[str]:
    """Replace names of recipes by files, and ``--teacher`` by the path in the teacher's configuration.

    Args:
        arguments: Words of the command line, the command first.

    Raises:
        ValueError: If a name is neither a file nor a recipe, or no configuration is named.
    """
    arguments = _with_config(arguments)
    last: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, joined, value = argument.partition("=")
        if flag not in ("-c", "--config", "--teacher"):
            yield argument
            continue
        value = os.path.expanduser(value if joined else next(rest, ""))  # no shell expands ~ behind =
        if not value:
            raise UserError(f"{flag} needs a name; give it a recipe, a run or a file.")
        if flag == "--teacher":
            last.append(f"--model.teacher.path={value}")
        elif "\n" in value or Path(value).is_file():  # a recipe's text: Lightning starts further ranks with our words
            if "\n" not in value:
                _check_yaml(Path(value))
            yield from ("-c", value)
        elif (config := _trained_config(value, arguments) or _config_of_folder(value)) is not None:
            yield from ("-c", str(config))
        else:
            for text in recipe_texts(value):
                yield from ("-c", text)
            yield f"--trainer.logger.init_args.name={value}"
    yield from last


def _trained_config(recipe: str, arguments: list[str]) -> Path | None:
    """Return the configuration, flags included, of the run of a recipe that is evaluated or resumed."""
    checkpoint = _value_of("--ckpt_path", arguments)
    resumes = arguments[0] == "fit" and checkpoint is not None
    if (arguments[0] in ("fit", "layers") and not resumes) or checkpoint not in (None, BEST, LAST):
        return None
    if str(_value_of("--trainer.logger", arguments)).lower() == "false":
        config = Run(_value_of("--trainer.default_root_dir", arguments) or ".").config_file
        return config if config.is_file() else None
    folder = _log_folder(arguments) / (_logger_value("name", arguments) or recipe)
    version = _logger_value("version", arguments)
    if version is not None:
        config = Run(folder / (f"version_{version}" if version.isdecimal() else version)).config_file
        return config if config.is_file() else None
    try:
        config = Run.newest_of(folder).config_file
    except MissingFileError:
        return None
    return config if config.is_file() else None


def _log_folder(arguments: list[str]) -> Path:
    """Return the folder that the flags of the logger, or of the Trainer, name in place of ``lightning_logs``."""
    root = _value_of("--trainer.default_root_dir", arguments)
    return Path(_logger_value("save_dir", arguments) or (LOGS if root is None else root / LOGS))


def _logger_value(name: str, arguments: list[str]) -> str | None:
    flags = (f"--trainer.logger.{part}{name}" for part in ("", "init_args."))
    return next(filter(None, (_value_of(flag, arguments) for flag in flags)), None)


def _check_yaml(file: Path) -> None:
    """Read a file of the user's, as jsonargparse does not name it where it is not YAML."""
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is not a YAML file ({' '.join(str(error).split())[:300]}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} is not a configuration; it needs sections such as model, data or trainer.")


def _config_of_folder(name: str) -> Path | None:
    """Return the configuration of a run that is named by its folder, or by the folder of its versions."""
    if name in recipe_names() or not Path(name).is_dir():
        return None
    run = Run.find(name)
    if not run.config_file.is_file():
        raise MissingFileError(f"The run {str(run.folder)!r} has no {CONFIG}; name a recipe or a YAML file with -c.")
    return run.config_file


def _value_of(flag: str, arguments: list[str]) -> str | None:
    joined = [argument.removeprefix(f"{flag}=") for argument in arguments if argument.startswith(f"{flag}=")]
    return next(iter(joined + [value for name, value in pairwise(arguments) if name == flag]), None)


def _with_config(arguments: list[str]) -> list[str]:
    """Add the configuration that a checkpoint describes where only the checkpoint is named."""
    flags = {argument.partition("=")[0] for argument in arguments}
    if flags & {"-c", "--config", "-h", "--help", "--model", "--model.class_path", "--print_config"}:
        return arguments
    if any(flag.endswith(".help") for flag in flags):
        return arguments
    checkpoint = _value_of("--ckpt_path", arguments)
    if arguments[0] in ("fit", "layers") or checkpoint in (None, BEST, LAST, "auto"):
        raise UserError("No model is named; add -c with a recipe, a run or a YAML file.")
    opened = Checkpoint.of_run(checkpoint)
    if "--trust" in flags:
        opened.trust()
    text = saved_configuration(opened)
    echo(f"The configuration is the one in {checkpoint}: its module and its data.")
    echo_imported(str(checkpoint), imported_packages(opened.trusted))
    if not any(line.startswith("data:") for line in text.splitlines()) and "--data" not in flags:
        raise UserError(f"{checkpoint!r} does not describe its data; add --data, or -c with a recipe or a run.")
    return [arguments[0], "-c", text, *arguments[1:]]
