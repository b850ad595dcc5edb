"""`kd-lightning completion`: completes commands, names and options in a shell, without torch."""

import ast
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from kd_lightning.cli.fit_help import OPTIONS
from kd_lightning.recipes import recipe_names
from kd_lightning.runs.run import LOGS, Run

_SCRIPT = """# Completes words of kd-lightning; for all shells, in ~/.bashrc: eval "$(kd-lightning completion)"
# In zsh, before it: autoload -U compinit bashcompinit && compinit && bashcompinit
_kd_lightning() {
    local IFS=$'\\n'
    COMPREPLY=($(kd-lightning completion -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null))
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == */ ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -o default -F _kd_lightning kd-lightning"""
_NAMES = {"-c", "--config", "--teacher"}
_EVALUATION = ("-c", "--ckpt_path", "--data.root", "--data.batch_size", "--trainer.devices", "--trainer.accelerator")
_LIGHTNING = ("fit", "validate", "test", "predict", "layers")
_PARSED = ("compress", "runs")


def completion(arguments: Sequence[str]) -> None:
    """Print the shell's script, or, after ``--``, what can stand for the last of the words that are typed so far.

    Args:
        arguments: Nothing, or ``--`` and the words after `kd-lightning`, the last one perhaps empty.
    """
    if not arguments or arguments[0] != "--":
        print(_SCRIPT)
        return
    words = _joined(arguments[1:])
    for candidate in candidates(words or [""]):
        print(candidate)


def candidates(words: Sequence[str]) -> list[str]:
    """Return what can stand for the last of some words.

    Args:
        words: Words after `kd-lightning`, as far as they are typed.

    Example:
        >>> candidates(["co"]), candidates(["fit", "-c", "digits/dk"]), candidates(["fit", "--trainer.prec"])
        (['compare', 'completion', 'compress'], ['digits/dkd'], ['--trainer.precision'])
    """
    *before, current = words
    if not before:
        return sorted(command for command in _commands() if command.startswith(current))
    flag, joined, value = current.partition("=")
    if joined and flag.startswith("-"):
        found = _values(flag, value)
    elif before[-1].startswith("-") and not current.startswith("-"):
        found = _values(before[-1], current)
    elif current.startswith("-"):
        found = _options(before[0])
        value = current
    else:
        found, value = [*_trained(current), *_files(current)], current
    prefix = value if joined and flag.startswith("-") else current
    return sorted({word for word in found if word.startswith(prefix)})


def _joined(words: Sequence[str]) -> list[str]:
    """Return words in which ``--flag = value``, as bash hands them on, is ``--flag value``."""
    found = [word for word in words if word != "="]
    return [*found, ""] if words and words[-1] == "=" else found


def _commands() -> list[str]:
    from kd_lightning.cli.main import COMMANDS

    return list(COMMANDS)


def _values(flag: str, begun: str) -> list[str]:
    """Return what can follow a flag."""
    if flag in _NAMES:
        return [*recipe_names(), *_trained(begun), *_files(begun)]
    for options in OPTIONS.values():
        for option in options:
            if option.flag == flag and option.choices:
                return [*option.choices, *(_files(begun) if flag == "--ckpt_path" else [])]
    if flag == "--delete":
        return [run.folder.relative_to(LOGS).as_posix() for run in Run.all_below(LOGS) if not run.is_published]
    return _files(begun)


def _options(command: str) -> list[str]:
    if command in _LIGHTNING:
        known = [option.flag for options in OPTIONS.values() for option in options]
        return [*known, "--help"] if command == "fit" else [*_EVALUATION, "--print_config", "--trust", "--help"]
    if command in _PARSED:
        parser = import_module(f"kd_lightning.cli.{command}").argument_parser()
        return [flag for action in parser._actions for flag in action.option_strings]
    return [*_arguments(command), "--help"]


def _arguments(command: str) -> Iterator[str]:
    """Yield the options of a command that is a function, which is read and not imported."""
    file = Path(__file__).with_name(f"{command}.py")
    if not file.is_file():
        return
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == command:
            for argument in node.args.args[len(node.args.args) - len(node.args.defaults) :]:
                yield f"--{argument.arg}"


def _trained(begun: str) -> list[str]:
    """Return the recipes that were trained, and the runs in the folder of the logs."""
    runs = [run.folder for run in Run.all_below(LOGS) if not run.is_published] if LOGS.is_dir() else []
    recipes = {folder.relative_to(LOGS).parent.as_posix() for folder in runs}
    return [*sorted(recipes & set(recipe_names())), *(map(str, runs) if begun.startswith(str(LOGS)) else [])]


def _files(begun: str) -> list[str]:
    """Return the files and folders that a beginning stands for; folders end with a slash."""
    place = Path(begun).expanduser()
    folder = place if begun.endswith("/") else place.parent
    if not folder.is_dir() or not begun:
        return []
    shown = begun[: begun.rfind("/") + 1]
    return [f"{shown}{file.name}{'/' * file.is_dir()}" for file in folder.iterdir() if not file.name.startswith(".")]
