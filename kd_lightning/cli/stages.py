"""The stages of a chain: names with commands, from a YAML file; imports no torch."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kd_lightning.errors import UserError
from kd_lightning.runs.commands import commands_left
from kd_lightning.runs.run import CONFIG, TEST, Run

_NAME = re.compile(r"\w[\w.-]*")
_PLACEHOLDER = re.compile(r"{([^{}]*)}")
RECORDS = "stages.json"
"""The file in a chain's folder that records what each stage was created from."""


@dataclass(frozen=True)
class Stage:
    """One step of a chain.

    Attributes:
        name: Name of the run, file or folder that it creates inside the chain's folder.
        command: Words after `kd-lightning`; ``{name}`` stands for the result of an earlier stage.
        needs: Names of the stages whose results it uses.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def trains(self) -> bool:
        """Return whether it creates a run, and not a file or a page."""
        return self.command[0] == "fit"

    @property
    def last_file(self) -> str:
        """Return the file that a run or a page gets last; an empty string where the result is a file itself."""
        return {"fit": TEST, "report": "index.html"}.get(self.command[0], "")

    def words(self, folder: Path) -> list[str]:
        """Return the command with the results of earlier stages filled in."""
        return [_PLACEHOLDER.sub(lambda found: str(folder / found[1]), word) for word in self.command]

    def commands(self, folder: Path, added: Sequence[str]) -> list[list[str]]:
        """Return the commands that create the result from nothing, word by word, as they can be run by hand.

        Args:
            folder: Folder of the chain.
            added: Options of the stage.
        """
        place = folder / self.name
        if not self.trains:
            return [[*self.words(folder), *added, "-o", str(place)]]
        log = "--trainer.logger.init_args"
        fit = [*self.words(folder), *added, f"{log}.save_dir={folder}", f"{log}.name=", f"{log}.version={self.name}"]
        return [fit, ["test", "-c", str(place / CONFIG)]]

    def commands_left(self, folder: Path, added: Sequence[str]) -> list[list[str]]:
        """Return the commands still to be run; an interrupted training is resumed."""
        commands = self.commands(folder, added)
        return commands_left(Run(folder / self.name), commands[0]) if self.trains else commands


def read_stages(file: Path, values: Mapping[str, str] | None = None) -> list[Stage]:
    """Return the stages of a YAML file, in its order.

    Args:
        file: Names with commands, in which ``{name}`` stands for the result of an earlier stage.
        values: Further words to fill in, for example ``{folder}`` in a packaged file, and ``{num_classes}``.

    Raises:
        ValueError: If the file does not have this form, or a stage uses one that does not come before it.
    """
    try:
        text = file.read_text()
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is not a YAML file ({' '.join(str(error).split())}).") from error
    if not content or not isinstance(content, dict) or not all(isinstance(line, str) for line in content.values()):
        raise UserError(f"{str(file)!r} must hold lines of the form `stage: command`, as `teacher: fit -c my/teacher`.")
    if isinstance(node, yaml.MappingNode) and len(node.value) > len(content):
        raise UserError(f"{str(file)!r} names a stage twice; each needs a name of its own for its result.")
    stages: list[Stage] = []
    for name, line in content.items():
        stages.append(_stage(name, line, [stage.name for stage in stages], values or {}))
    return stages


def _stage(name: object, line: str, before: list[str], values: Mapping[str, str]) -> Stage:
    try:
        words = shlex.split(_fill(line, values))
    except ValueError as error:
        raise UserError(f"The stage {name!r} cannot be split into words ({error}): {line!r}.") from error
    if not words or words[0] not in ("fit", "export", "report"):
        raise UserError(f"The stage {name!r} must begin with fit, export or report, got {line!r}.")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == RECORDS:
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
