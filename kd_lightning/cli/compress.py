"""`kd-lightning compress`: a chain of commands from a teacher to files that serve; imports no torch."""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from kd_lightning.cli.stage_options import options_of_stages
from kd_lightning.cli.stages import RECORDS, Stage, read_stages
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.files.digest import sha256
from kd_lightning.recipes import compress_stages, recipe_names, recipe_texts
from kd_lightning.runs.commands import process_words
from kd_lightning.runs.run import LOGS, Run

try:
    import fcntl  # filelock does not let a child process inherit its lock, which must outlive this process
except ImportError:  # Windows, where two chains may work in one folder
    fcntl = None  # type: ignore[assignment]

_SIGNALLED = 128
"""Above this are the exit statuses of commands that a signal ended."""


def compress(arguments: Sequence[str]) -> None:
    """Run a chain of commands, resuming where it was interrupted.

    Args:
        arguments: ``-c`` with a folder of recipes or a YAML file of stages, ``-o`` with the folder for the results,
            and options that are added to every stage that takes them.

    Raises:
        FileNotFoundError: If there is no such file of stages.
        ValueError: If a stage is invalid, no stage takes an option, a result was created from different inputs, or
            another process works in the folder.
    """
    options, added = argument_parser().parse_known_args(arguments)
    if len(options.config) > 1:
        raise UserError("compress takes one -c; name further configurations in the stages of a chain of your own.")
    [config] = map(os.path.expanduser, options.config)
    file, values = compress_stages(config)
    classes = {} if options.num_classes is None else {"num_classes": options.num_classes}
    networks, added = _networks(added, file)
    stages = read_stages(file, {**values, **classes, **networks})
    folder: Path = (options.output or LOGS / "compress" / Path(config).stem).expanduser()
    titles = [f"== {number}/{len(stages)} {stage.name}:" for number, stage in enumerate(stages, 1)]
    taken = options_of_stages([stage.words(folder) for stage in stages], added)
    if options.print:
        for title, stage, mine in zip(titles, stages, taken, strict=True):
            _print_commands(title, stage.commands(folder, mine))
        return
    with _locked(folder) as lock:
        for title, stage, mine in zip(titles, stages, taken, strict=True):
            _print_commands(title, stage.commands(folder, mine))
            _run(stage, folder, mine, lock)
    print(f"All {len(stages)} stages are done; their results are in {folder}.")


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's words."""
    parser = argparse.ArgumentParser(
        prog="kd-lightning compress",
        description="Run a chain of commands from a teacher to files that serve, resuming where it was interrupted.",
        epilog="--model.teacher and --model.student replace the networks of a packaged chain (timm/NAME, "
        "torchvision/NAME@WEIGHTS or the import path of your own). All other options are added to every fit that takes "
        "them, or else to every export and report.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", required=True, action="append", help="a folder of recipes (digits), or a YAML file of stages"
    )
    parser.add_argument("-o", "--output", type=Path, help="the folder for the runs and files of the stages")
    parser.add_argument("--num_classes", help="fills in {num_classes} in the stages of your own chain")
    parser.add_argument("--print", action="store_true", help="print the commands and run none")
    return parser


def _networks(added: Sequence[str], file: Path) -> tuple[dict[str, str], list[str]]:
    """Return what is filled into the stages for the networks of the teacher and the student, and the other options.

    The stages name the places: ``{teacher_network}`` and ``{student_network}`` of a training without a teacher,
    ``{student_option}`` of one with a teacher.
    """
    text, left, found = file.read_text(errors="replace"), [], dict.fromkeys(("teacher", "student"), "")
    rest = iter(added)
    for word in rest:
        flag, joined, value = word.partition("=")
        role = flag.removeprefix("--model.")
        if role not in found or f"{{{role}_network}}" not in text:
            left.append(word)
            continue
        found[role] = value if joined else next(rest, "")
    options = {f"{role}_network": _option("network", name) for role, name in found.items()}
    return {**options, "student_option": _option("student", found["student"])}, left


def _option(name: str, value: str) -> str:
    return shlex.quote(f"--model.{name}={value}") if value else ""


def _print_commands(title: str, commands: list[list[str]]) -> None:
    for command in commands:
        print(title, shlex.join(["kd-lightning", *command]), flush=True)


def _run(stage: Stage, folder: Path, added: Sequence[str], lock: int) -> None:
    """Create a stage's result unless it exists, and record what it is created from."""
    place = folder / stage.name
    before, now = _records(folder).get(stage.name), _inputs(stage, folder, added)
    if place.exists() and before is None:
        raise UserError(f"{str(place)!r} exists and was not created by this chain; name another folder with -o.")
    if place.exists() and before != now:
        other = next((name for name in now if before and before.get(name) != now[name]), "the options")
        raise UserError(
            f"{str(place)!r} was created from different inputs (changed: {other}); restore them, delete it, or name "
            "another folder with -o."
        )
    result = place / stage.last_file
    if result.exists():
        print(f"   It exists: {result}.", flush=True)
        return
    _record(folder, stage.name, now)
    for command in stage.commands_left(folder, added):
        code = _call(command, lock)
        if code:
            ended = "was interrupted; run" if code > _SIGNALLED else "failed, as said above; fix that, and run"
            print(f"kd-lightning compress: stage {stage.name!r} {ended} the same command to resume.")
            sys.exit(code)


def _call(command: list[str], lock: int) -> int:
    """Run a command of this package in a process group of its own, and pass on each signal that this one gets, once."""
    forwarded = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT}
    if hasattr(signal, "SIGHUP"):
        forwarded[signal.SIGHUP] = signal.SIGTERM
    words = process_words(command)
    with subprocess.Popen(words, process_group=0, pass_fds=[lock] if fcntl else []) as process:
        before = {
            number: signal.signal(number, lambda *_, sent=sent: process.send_signal(sent))
            for number, sent in forwarded.items()
        }
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold a lock that processes started from here inherit, so that it outlives this process if they do."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"Another process, perhaps of a chain that was killed, works in {str(folder)!r}; end it, or wait "
                    "until it ends."
                ) from error
        yield file.fileno()


def _records(folder: Path) -> dict[str, Mapping[str, str]]:
    file = folder / RECORDS
    try:
        records: dict[str, Mapping[str, str]] = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{str(file)!r} is damaged; name another folder with -o.") from error
    return records


def _record(folder: Path, name: str, inputs: Mapping[str, str]) -> None:
    with atomic_write(folder / RECORDS) as file:
        file.write(json.dumps({**_records(folder), name: inputs}, indent=1).encode())


def _inputs(stage: Stage, folder: Path, added: Sequence[str]) -> dict[str, str]:
    """Return a stage's words, and digests of the files and recipes that they name and of earlier results."""
    words = [*stage.command, *added]
    inputs = {"the options": shlex.join(words)}
    for name in [part for word in words for part in (word, word.partition("=")[2])]:
        if name in recipe_names():
            inputs[name] = hashlib.sha256("".join(recipe_texts(name)).encode()).hexdigest()
        elif (file := Path(name).expanduser()).is_file():
            inputs[name] = _digest(file)
    return inputs | {need: _result(need, folder) for need in stage.needs}


def _result(name: str, folder: Path) -> str:
    """Return the digest of the file that a stage created, or of the best checkpoint of its run."""
    place = folder / name
    try:
        return _digest(place if place.is_file() else Run(place).best_file)
    except MissingFileError as error:
        raise UserError(f"{str(place)!r} has lost its best checkpoint; delete it to train it again.") from error


def _digest(file: Path) -> str:
    """Return the digest of a file; of a checkpoint's tensors only, as its other entries differ from run to run."""
    if not zipfile.is_zipfile(file):
        return sha256(file)
    with zipfile.ZipFile(file) as parts:
        found = [(part.filename.partition("/")[2], part.CRC) for part in parts.infolist()]
    return hashlib.sha256(repr([part for part in found if part[0].startswith("data/")]).encode()).hexdigest()
