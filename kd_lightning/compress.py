"""`kd-lightning compress`: stages from a teacher to files that serve, each a command of its own; imports no torch."""

import argparse
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kd_lightning.recipes import stages_of
from kd_lightning.runs import LOGS, resolve_checkpoint
from kd_lightning.whole_files import whole_file

_RECORDS = "stages.json"
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


def compress(arguments: Sequence[str]) -> None:
    """Run a chain of commands, going on where it was stopped.

    Args:
        arguments: ``-c`` with a folder of recipes or a YAML file of stages, ``-o`` with the folder that they go into,
            and what is to be added to every ``fit``.

    Raises:
        FileNotFoundError: If there is no such file of stages.
        ValueError: If a stage is not as it must be, or what it made before was made otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="kd-lightning compress",
        description="Run a chain of commands from a teacher to files that serve, going on where it was stopped.",
        epilog="All other options are added to every fit.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, help="a folder of recipes (digits), or a YAML file of stages")
    parser.add_argument("-o", "--output", type=Path, help="the folder that the stages' runs and files go into")
    parser.add_argument("--print", action="store_true", help="print the commands and run none")
    options, added = parser.parse_known_args(arguments)
    stages = read_stages(*stages_of(options.config))
    folder: Path = options.output or LOGS / "compress" / Path(options.config).stem
    for number, stage in enumerate(stages, 1):
        commands = list(_commands(stage, folder, added))
        for command in commands:
            print(f"== {number}/{len(stages)} {stage.name}: {shlex.join(['kd-lightning', *command])}", flush=True)
        if not options.print:
            _run(stage, folder, commands)
    if not options.print:
        print(f"All {len(stages)} stages are done; what they made is in {folder}.")


def read_stages(file: Path, recipes: str | None = None) -> list[Stage]:
    """The stages of a YAML file, in its order.

    Args:
        file: Names with commands, ``{recipes}`` for the folder of recipes and ``{name}`` for an earlier stage.
        recipes: What ``{recipes}`` stands for, in a packaged file.

    Raises:
        ValueError: If it is no such file, or a stage names none before it.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is no YAML file ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict) or not all(isinstance(line, str) for line in content.values()):
        raise ValueError(
            f"{str(file)!r} must hold lines of the form `stage: command`, as `teacher: fit -c my/teacher`."
        )
    stages: list[Stage] = []
    for name, line in content.items():
        words = shlex.split(line if recipes is None else line.replace("{recipes}", recipes))
        if not words or words[0] not in ("fit", "export", "report"):
            raise ValueError(f"The stage {name!r} must begin with fit, export or report, got {line!r}.")
        if Path(str(name)).name != name or name == _RECORDS:
            raise ValueError(f"The name of a stage becomes that of a folder or a file, got {name!r}.")
        needs = tuple(dict.fromkeys(_PLACEHOLDER.findall(" ".join(words))))
        unknown = [need for need in needs if need not in [stage.name for stage in stages]]
        if unknown:
            raise ValueError(f"The stage {name!r} names {{{unknown[0]}}}, which is no stage before it.")
        stages.append(Stage(name, tuple(words), needs))
    return stages


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


def _run(stage: Stage, folder: Path, commands: list[list[str]]) -> None:
    """Make a stage unless it is made, and record what it was made of."""
    place = folder / stage.name
    made = place / "test.json" if stage.trains else place
    before = _records(folder).get(stage.name)
    now = {"commands": commands, **{need: _digest(folder / need) for need in stage.needs}}
    if place.exists() and before is None:
        raise ValueError(f"{str(place)!r} is there and was not made by this chain; name another folder with -o.")
    if place.exists() and before != now:
        other = next((need for need in stage.needs if before and before.get(need) != now[need]), "the options")
        raise ValueError(
            f"{str(place)!r} was made from something else (different: {other}); give the options that it was made "
            "with, delete it, or name another folder with -o."
        )
    if made.exists():
        print(f"   It is there: {made}.", flush=True)
        return
    _record(folder, stage.name, now)
    for command in commands:
        goes_on = command[0] == "fit" and (place / "config.yaml").is_file()
        code = _call(["fit", "-c", str(place / "config.yaml"), "--ckpt_path=auto"] if goes_on else command)
        if code:
            print(f"kd-lightning compress: stage {stage.name!r} was not finished; the same command goes on from there.")
            sys.exit(code)


def _call(command: list[str]) -> int:
    """Run a command of this package; signals that end this process end it first."""
    with subprocess.Popen([sys.executable, "-m", "kd_lightning", *command]) as process:
        stop = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        interrupt = signal.signal(signal.SIGINT, lambda *_: None)  # the terminal has told both
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, interrupt)


def _records(folder: Path) -> dict[str, Mapping[str, object]]:
    file = folder / _RECORDS
    return json.loads(file.read_text()) if file.is_file() else {}


def _record(folder: Path, name: str, what: Mapping[str, object]) -> None:
    with whole_file(folder / _RECORDS) as file:
        file.write(json.dumps({**_records(folder), name: what}, indent=1).encode())


def _digest(place: Path) -> str:
    """Of the file, or of a run's best checkpoint."""
    return hashlib.sha256((place if place.is_file() else resolve_checkpoint("best", place)).read_bytes()).hexdigest()
