"""The command `kd-lightning`; commands that need no network start without torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module

_LIGHTNING = {
    "fit": "Train a teacher, or distil a student.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
    "predict": "Write the labels of images to a CSV file.",
    "layers": "Print the layers of a recipe's networks with their shapes.",
}
_FUNCTIONS = {
    "recipes": "List the recipes that -c takes by name.",
    "init": "Look at a folder of images; write a commented YAML file for it.",
    "export": "Write a trained network to a file that serves (ONNX, torch, safetensors).",
    "classify": "Classify image files with an exported ONNX file.",
    "report": "Measure runs and exported files on test images; write a page.",
    "compare": "Print a table of tested runs.",
    "doctor": "Print versions, devices, speeds and what is missing, for an issue.",
}
"""Commands that are a function; see ``cli/functions.py``."""
_PARSERS = {
    "runs": "List runs with their figures; delete those that are named.",
    "compress": "Run the chain: teacher, student, pruned, int8, report; resumable.",
    "completion": 'Print what completes words in a shell: eval "$(kd-lightning completion)".',
}
"""Commands whose function takes the words that follow, and parses them itself."""
COMMANDS = _LIGHTNING | _FUNCTIONS | _PARSERS
"""All commands, with a line each."""


def main() -> None:
    """Run the command that the arguments name."""
    _find_modules_here()
    try:
        _run(sys.argv[1] if len(sys.argv) > 1 else "--help")
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _find_modules_here() -> None:
    """Let a user's modules in the working folder be imported, as ``python -m`` does; installed ones come first."""
    if os.getcwd() not in sys.path and not sys.flags.safe_path:
        sys.path.append(os.getcwd())


def _run(command: str) -> None:
    if command == "fit" and {"-h", "--help"} & set(sys.argv[2:]):
        from kd_lightning.cli.fit_help import fit_help

        print(fit_help())
    elif command in _LIGHTNING:
        sys.argv[1:] = ["--help" if word == "--help-all" else word for word in sys.argv[1:]]
        with _starting():
            from kd_lightning.cli.lightning_cli import run

        run()
    elif command in _FUNCTIONS:
        _call(command)
    elif command in _PARSERS:
        from kd_lightning.cli.errors import exit_on_error

        with exit_on_error(command, OSError):
            getattr(import_module(f"kd_lightning.cli.{command}"), command)(sys.argv[2:])
    elif command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        from kd_lightning import __version__

        print(__version__)
    else:
        near = get_close_matches(command, COMMANDS, n=1)
        nearest = f"; the nearest is {near[0]}" if near else ""
        sys.exit(f"kd-lightning: there is no command {command!r}{nearest}; `kd-lightning --help` lists all.")


@contextmanager
def _starting() -> Iterator[None]:
    """Show on a terminal that something happens while PyTorch is imported, which takes seconds."""
    shown = sys.stderr.isatty()
    if shown:
        print("Starting", end="\r", file=sys.stderr, flush=True)
    yield
    if shown:
        print("\033[K", end="", file=sys.stderr, flush=True)  # erases the line


def _call(command: str) -> None:
    """Parse the arguments of a function, and call it."""
    from kd_lightning.cli.errors import exit_on_error
    from kd_lightning.cli.functions import parse_function
    from kd_lightning.cli.plain_warnings import show_plain_warnings

    with _starting():
        import_module(f"kd_lightning.cli.{command}")
    with exit_on_error(command, OSError):
        function, options = parse_function(command, sys.argv[2:])
        show_plain_warnings()
        function(**options)


def _help() -> str:
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kd-lightning COMMAND ...",
            "",
            "Knowledge distillation for PyTorch Lightning.",
            "",
            *lines,
            "",
            "First steps:",
            "  kd-lightning fit -c digits/teacher",
            "  kd-lightning fit -c digits/distill",
            "  kd-lightning test -c digits/distill",
            "",
            "`kd-lightning COMMAND --help` lists a command's options.",
        ]
    )
