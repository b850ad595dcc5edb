"""`kd-lightning compress`: stages from a teacher to files that serve, each a command of its own; imports no torch."""

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from kd_lightning.errors import UserError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.recipes import compress_stages, recipe_names, recipe_texts
from kd_lightning.runs.run import LOGS, Run

try:
    import fcntl
except ImportError:  # Windows, where two may work in one folder
    fcntl = None  # type: ignore[assignment]

_RECORDS = "stages.json"
_NAME = re.compile(r"\w[\w.-]*")
_PLACEHOLDER = re.compile(r"{([^{}]*)}")


@dataclass(frozen=True)
class Stage:
    """One step of a chain.

    Attributes:
        name: Of the run, the file or the folder that it makes, inside the chain's folder.
        command: Words after `kd-lightning`; ``{name}`` stands for what an earlier stage made.
        needs: The stages that it names.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def trains(self) -> bool:
        """Whether it makes a run, and not a file or a page."""
        return self.command[0] == "fit"

    @property
    def last(self) -> str:
        """What is there, in a run or a page, when all of it is; nothing for a file."""
        return {"fit": "test.json", "report": "index.html"}.get(self.command[0], "")


def compress(arguments: Sequence[str]) -> None:
    """Run a chain of commands, going on where it was stopped.

    Args:
        arguments: ``-c`` with a folder of recipes or a YAML file of stages, ``-o`` with the folder that they go into,
            and what is to be added to every ``fit``.

    Raises:
        FileNotFoundError: If there is no such file of stages.
        ValueError: If a stage is not as it must be, what it made before was made otherwise, or another process is at
            work in the folder.
    """
    parser = argparse.ArgumentParser(
        prog="kd-lightning compress",
        description="Run a chain of commands from a teacher to files that serve, going on where it was stopped.",
        epilog="All other options are added to every fit.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, help="a folder of recipes (digits), or a YAML file of stages")
    parser.add_argument("-o", "--output", type=Path, help="the folder that the stages' runs and files go into")
    parser.add_argument("--num_classes", help="what {num_classes} stands for in the stages, as in those of folder")
    parser.add_argument("--print", action="store_true", help="print the commands and run none")
    options, added = parser.parse_known_args(arguments)
    file, values = compress_stages(options.config)
    classes = {} if options.num_classes is None else {"num_classes": options.num_classes}
    stages = read_stages(file, {**values, **classes})
    folder: Path = options.output or LOGS / "compress" / Path(options.config).stem
    titles = [f"== {number}/{len(stages)} {stage.name}:" for number, stage in enumerate(stages, 1)]
    if options.print:
        for title, stage in zip(titles, stages, strict=True):
            _tell(title, _commands(stage, folder, added))
        return
    with _alone_in(folder) as lock:
        for title, stage in zip(titles, stages, strict=True):
            _tell(title, _commands(stage, folder, added))
            _run(stage, folder, added, lock)
    print(f"All {len(stages)} stages are done; what they made is in {folder}.")


def read_stages(file: Path, values: Mapping[str, str] | None = None) -> list[Stage]:
    """The stages of a YAML file, in its order.

    Args:
        file: Names with commands, in which ``{name}`` stands for what an earlier stage made.
        values: What else is to be filled in: ``{folder}`` in a packaged file, ``{num_classes}``.

    Raises:
        ValueError: If it is no such file, or a stage names none before it.
    """
    try:
        text = file.read_text()
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is no YAML file ({' '.join(str(error).split())}).") from error
    if not content or not isinstance(content, dict) or not all(isinstance(line, str) for line in content.values()):
        raise UserError(f"{str(file)!r} must hold lines of the form `stage: command`, as `teacher: fit -c my/teacher`.")
    if isinstance(node, yaml.MappingNode) and len(node.value) > len(content):
        raise UserError(f"{str(file)!r} names a stage twice; what each makes lies under its name.")
    stages: list[Stage] = []
    for name, line in content.items():
        stages.append(_stage(name, line, [stage.name for stage in stages], values or {}))
    return stages


def _stage(name: object, line: str, before: list[str], values: Mapping[str, str]) -> Stage:
    try:
        words = shlex.split(_fill(_fill(line, values), values))  # the recipes' options name num_classes
    except ValueError as error:
        raise UserError(f"The stage {name!r} cannot be split into words ({error}): {line!r}.") from error
    if not words or words[0] not in ("fit", "export", "report"):
        raise UserError(f"The stage {name!r} must begin with fit, export or report, got {line!r}.")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == _RECORDS:
        raise UserError(f"The name of a stage becomes that of a folder or a file, got {name!r}.")
    needs = tuple(dict.fromkeys(_PLACEHOLDER.findall(" ".join(words))))
    unknown = next((need for need in needs if need not in before), None)
    if unknown == "num_classes":
        raise UserError(f"The stage {name!r} needs the number of classes; add --num_classes.")
    if unknown is not None:
        raise UserError(f"The stage {name!r} names {{{unknown}}}, which is not a stage before it.")
    return Stage(name, tuple(words), needs)


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def _tell(title: str, commands: Iterator[list[str]]) -> None:
    for command in commands:
        print(title, shlex.join(["kd-lightning", *command]), flush=True)


def _commands(stage: Stage, folder: Path, added: Sequence[str]) -> Iterator[list[str]]:
    """What makes a stage, word by word, as it can be run by hand."""
    words = [_PLACEHOLDER.sub(lambda found: str(folder / found[1]), word) for word in stage.command]
    place = folder / stage.name
    if not stage.trains:
        yield [*words, "-o", str(place)]
        return
    log = "--trainer.logger.init_args"
    yield [*words, *added, f"{log}.save_dir={folder}", f"{log}.name=", f"{log}.version={stage.name}"]
    yield ["test", "-c", str(place / "config.yaml")]


def _run(stage: Stage, folder: Path, added: Sequence[str], lock: int) -> None:
    """Make a stage unless it is made, and record what it was made of."""
    place = folder / stage.name
    made, before = place / stage.last, _records(folder).get(stage.name)
    now = _made_of(stage, folder, added)
    if place.exists() and before is None:
        raise UserError(f"{str(place)!r} is there and was not made by this chain; name another folder with -o.")
    if place.exists() and before != now:
        other = next((what for what in now if before and before.get(what) != now[what]), "the options")
        raise UserError(
            f"{str(place)!r} was made from something else (different: {other}); give what it was made of, delete it, "
            "or name another folder with -o."
        )
    if made.exists():
        print(f"   It is there: {made}.", flush=True)
        return
    _record(folder, stage.name, now)
    for command in _commands(stage, folder, added):
        goes_on = command[0] == "fit" and (place / "config.yaml").is_file()
        code = _call(["fit", "-c", str(place / "config.yaml"), "--ckpt_path=auto"] if goes_on else command, lock)
        if code:
            print(f"kd-lightning compress: stage {stage.name!r} was not finished; the same command goes on from there.")
            sys.exit(code)


def _call(command: list[str], lock: int) -> int:
    """Run a command of this package, in a group of its own: what ends this process is told to it, once."""
    words = [sys.executable, "-m", "kd_lightning", *command]
    ends = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT}
    if hasattr(signal, "SIGHUP"):
        ends[signal.SIGHUP] = signal.SIGTERM
    with subprocess.Popen(words, process_group=0, pass_fds=[lock] if fcntl else []) as process:
        before = {
            told: signal.signal(told, lambda *_, passed=passed: process.send_signal(passed))
            for told, passed in ends.items()
        }
        try:
            code = process.wait()
        finally:
            for told, handler in before.items():
                signal.signal(told, handler)
    return code if code >= 0 else 128 - code


@contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """A lock that processes started from here hold as well, so that it outlives this one if they do."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"Another process, perhaps of a chain that was killed, is at work in {str(folder)!r}; end it, or "
                    "wait until it has ended."
                ) from error
        yield file.fileno()


def _records(folder: Path) -> dict[str, Mapping[str, str]]:
    file = folder / _RECORDS
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{str(file)!r} is damaged; name another folder with -o.") from error


def _record(folder: Path, name: str, what: Mapping[str, str]) -> None:
    with atomic_write(folder / _RECORDS) as file:
        file.write(json.dumps({**_records(folder), name: what}, indent=1).encode())


def _made_of(stage: Stage, folder: Path, added: Sequence[str]) -> dict[str, str]:
    """The words of a stage's command, and digests of the files and recipes that they name and of earlier stages."""
    words = [*stage.command, *(added if stage.trains else [])]
    made = {"the options": shlex.join(words)}
    for name in [part for word in words for part in (word, word.partition("=")[2])]:
        if name in recipe_names():
            made[name] = hashlib.sha256("".join(recipe_texts(name)).encode()).hexdigest()
        elif os.path.isfile(name):
            made[name] = _digest(Path(name))
    return made | {need: _result(need, folder) for need in stage.needs}


def _result(name: str, folder: Path) -> str:
    """The digest of the file that a stage made, or of the best checkpoint of its run."""
    place = folder / name
    try:
        return _digest(place if place.is_file() else Run(place).best)
    except FileNotFoundError as error:
        raise UserError(f"{str(place)!r} has lost its best checkpoint; delete it, and it is made again.") from error


def _digest(file: Path) -> str:
    """Of a checkpoint by its tensors: what else is in one, as the time that it took, differs from run to run."""
    if not zipfile.is_zipfile(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    with zipfile.ZipFile(file) as parts:
        found = [(part.filename.partition("/")[2], part.CRC) for part in parts.infolist()]
    return hashlib.sha256(repr([part for part in found if part[0].startswith("data/")]).encode()).hexdigest()
