"""Networks that arguments and configurations name shortly, written out before they are parsed."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.trust import (
    check_trusted_classes,
    class_paths,
    import_classes,
    imported_packages,
    is_from_checkpoint,
    referenced_classes,
    resolve,
    strip_pretrained,
)
from kd_lightning.cli.changed_classes import is_changed_inside, overridden
from kd_lightning.cli.network_names import Node, has_weights, is_short_name, long_form, published_classes
from kd_lightning.cli.parse_errors import argument_names
from kd_lightning.cli.sources import echo_imported
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.runs.run import Run

Position = tuple[str, ...]
"""Keys from the top of a configuration, for example ``("model", "init_args", "student")``."""
_MODEL: Position = ("model", "init_args")
_ROLES = ("network", "student", "teacher")
_FROM_CHECKPOINT = "kd_lightning.networks.from_checkpoint"
_ANY_NETWORK = "torch.nn.Identity"
_KEYS = ("class_path", "init_args", "dict_kwargs")
_NO_NETWORKS = ("path", "class_path", "teacher_cache", "feature_cache", "entry")
"""Arguments whose value may look like a short name, a folder for example."""


@dataclass
class Source:
    """Arguments of a command that configure its networks.

    Attributes:
        words: The arguments: ``-c`` and a configuration, or a flag with its value.
        content: The part of a configuration in them, as nested plain data; ``None`` for all other arguments.
        position: Place of a flag's value in it; empty for a configuration.
        is_recipe: Whether it is the text of a recipe, which others change.
    """

    words: list[str]
    content: dict[str, Any] | None = None
    position: Position = ()
    is_recipe: bool = False


def write_networks(words: list[str], count_classes: Callable[[], int | None]) -> list[str]:
    """Return a command's arguments with the networks in them written out, whether flags or YAML files name them.

    A short name (``timm/NAME``, ``torchvision/NAME@WEIGHTS``) becomes a class with its arguments and the number of the
    data's classes. So does the import path of a class or function that stands for the trained network, the student or
    the teacher, if it has an argument ``num_classes``. Where the network is loaded from a file (the teacher of a
    recipe, or of ``--teacher``), the name is that of the network in it. Where none is named, it is the one that the run
    has trained, or that a checkpoint of a run describes, if all of its classes may be imported for a file.

    Args:
        words: Arguments with recipes and ``--teacher`` written out.
        count_classes: Returns the number of classes of the data, ``None`` where it is not known.

    Raises:
        UserError: If a network or its weights do not exist, or cannot be used where they are named.
    """
    sources = list(_sources(words))
    if not any(source.content for source in sources):
        return words
    writer = _Writer(sources, cache(count_classes), downloads=words[0] != "layers")
    written = list(_without_former_arguments(sources, writer))
    # other commands may be given a checkpoint, which is data and must not have a run's classes imported
    return [*written, *(writer.networks_of_runs() if words[0] in ("fit", "layers") else ())]


def _without_former_arguments(sources: list[Source], writer: "_Writer") -> Iterator[str]:
    """Yield the arguments of all sources; a network inside another keeps nothing where its class changes."""
    networks: dict[str, Any] = {}
    for source in sources:
        yield from writer.written(source)
        for role in _ROLES:
            given = _get(source.content, (*_MODEL, role))
            changed = is_changed_inside(networks.get(role), given)
            networks[role] = networks.get(role) if given is None else overridden(networks.get(role), given)
            if changed:
                whole = {"model": {"init_args": {role: networks[role]}}}
                yield from (f"--model.{role}={_ANY_NETWORK}", "-c", yaml.safe_dump(whole, sort_keys=False))


def _sources(words: list[str]) -> Iterator[Source]:
    rest = iter(words)
    for word in rest:
        flag, joined, value = word.partition("=")
        if flag in ("-c", "--config"):
            value = value if joined else next(rest, "")
            text = value if "\n" in value else Path(value).read_text() if Path(value).is_file() else ""
            content = yaml.safe_load(text)
            model = content.get("model") if isinstance(content, dict) else None
            given = {"model": model} if isinstance(model, dict) else None
            yield Source(["-c", value], given, is_recipe="\n" in value)
        elif flag == "--model" or flag.startswith("--model."):
            words_of_it = [word] if joined else [word, next(rest, "")]
            yield _source_of_flag(words_of_it, flag, value if joined else words_of_it[1])
        else:
            yield Source([word])


def _source_of_flag(words: list[str], flag: str, value: str) -> Source:
    """Return what a flag configures, for example ``--model.teacher.path=x``, as a configuration says it."""
    names = flag.removeprefix("--").removesuffix("+").split(".")  # --list+=item appends
    if names[-1] == "help":
        return Source(words)
    keys = names[:1]
    for name in names[1:]:
        inside = keys[-1] in ("init_args", "dict_kwargs")
        keys += [name] if name in _KEYS or inside else ["init_args", name]
    content: Any = value
    with suppress(yaml.YAMLError):
        content = yaml.safe_load(value)
    for key in reversed(keys):
        content = {key: content}
    return Source(words, content, tuple(keys))


class _Writer:
    def __init__(self, sources: list[Source], count_classes: Callable[[], int | None], *, downloads: bool) -> None:
        self.sources = sources
        self.downloads = downloads
        self.count_classes = count_classes
        self.flags = {source.words[0].partition("=")[0] for source in sources if source.words[0].startswith("--")}

    def written(self, source: Source) -> list[str]:
        """Return the arguments of a source with its networks written out."""
        if source.content is None:
            return source.words
        content = self._write(source.content, (), source)
        if content == source.content:
            return source.words
        source.content = content
        if not source.position:
            text = source.words[1]
            whole = yaml.safe_load(text if "\n" in text else Path(text).read_text())
            return ["-c", yaml.safe_dump({**whole, **content}, sort_keys=False)]
        flag, position = source.words[0].partition("=")[0], source.position
        if position[-1] == "class_path":
            flag, position = flag.removesuffix(".class_path"), position[:-1]
        return [f"{flag}={json.dumps(_get(content, position))}"]

    def networks_of_runs(self) -> Iterator[str]:
        """Yield configurations of the networks that files are loaded into, as the runs that are named describe them."""
        contents = [source.content for source in self.sources if source.content is not None]
        merged = _merge(*contents)
        own = _merge(*(source.content for source in self.sources if source.content and not source.is_recipe))
        teacher = _get(merged, (*_MODEL, "teacher", "init_args", "path"))
        for position, node in _from_checkpoints(_get(merged, _MODEL), _MODEL):
            path = node["init_args"].get("path")
            if position[2] == "student" and teacher is not None and str(path) != str(teacher):
                path = teacher if _is_recipe(path) else path  # as find_teacher does
            if _get(own, (*position, "init_args", "network")) is None and (found := self._trained_network(path)):
                content: Any = found  # not a flag, in which jsonargparse reads some nulls as text
                for key in reversed((*position, "init_args", "network")):
                    content = {key: content}
                yield from ("-c", yaml.safe_dump(content, sort_keys=False))

    def _write(self, value: Any, position: Position, source: Source) -> Any:
        """Return a part of a configuration with all its networks written out."""
        if is_short_name(value) and position[-1] not in _NO_NETWORKS:
            return self._named(value, position)
        if isinstance(value, str) and position[:-1] == _MODEL and position[-1] in _ROLES:
            return self._architecture(value, position)
        if isinstance(value, list):
            return [self._write(item, (*position, str(number)), source) for number, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        written = {key: self._write(item, (*position, str(key)), source) for key, item in value.items()}
        if is_short_name(written.get("class_path")):
            return _merge(self._named(written.pop("class_path"), position), written)
        return written

    def _named(self, name: str, position: Position) -> Node:
        """Return the long form of a short name, with random weights where nothing is to be downloaded."""
        node = self._fitting(name, position)
        return node if self.downloads else _stripped(node)

    def _fitting(self, name: str, position: Position) -> Node:
        """Return the long form of a short name, as it fits the place."""
        around, here = self._class_at(position[:-2]), self._class_at(position)
        if is_from_checkpoint(around):
            return _stripped(long_form(name, self._num_classes(name)))
        if str(around).endswith("replace_head"):
            return long_form(name, keep_head=True)
        if position[:-1] != _MODEL or position[-1] not in _ROLES:
            return long_form(name, self._num_classes(name))
        if is_from_checkpoint(here) or (position[-1] == "teacher" and self._has_teacher_file):
            inner = _stripped(long_form(name, self._num_classes(name)))
            return {"class_path": _FROM_CHECKPOINT, "init_args": {"network": inner}}
        if position[-1] == "teacher":
            _check_teaches(name, self._num_classes(name))
        return long_form(name, self._num_classes(name))

    def _architecture(self, name: str, position: Position) -> Any:
        """Return the class or function of an import path with the number of classes, if it takes it."""
        flags = f"--{position[0]}.{position[-1]}."
        named = resolve(name) if "." in name else None
        further = {flag for flag in self.flags if flag.startswith(flags)} - {f"{flags}path"}
        if not callable(named) or isinstance(named, type(inspect)) or further:
            return name
        arguments = argument_names(name)
        loaded = (position[-1] == "teacher" and self._has_teacher_file) or is_from_checkpoint(self._class_at(position))
        if not (loaded and _needs_nothing(named)) and "num_classes" not in arguments:
            return name
        count = self.count_classes() or None if "num_classes" in arguments else None  # 0: all are unlabelled
        node: Node = {"class_path": name, **({} if count is None else {"init_args": {"num_classes": count}})}
        if loaded and _needs_nothing(named):
            return {"class_path": _FROM_CHECKPOINT, "init_args": {"network": node}}
        return name if count is None else node

    def _num_classes(self, name: str) -> int | None:
        count = self.count_classes()
        if count == 0:
            count = self._classes_of_teacher()
        if count == 0:
            raise UserError(
                f"The data name no classes, so the number of those of {name} is not known; put the images into a "
                "folder for each class, or name the network by class_path with its num_classes."
            )
        return count

    def _classes_of_teacher(self) -> int:
        """Return the number of classes of the teacher, if its run is named; otherwise 0."""
        contents = [source.content for source in self.sources if source.content is not None]
        node = self._trained_network(_get(_merge(*contents), (*_MODEL, "teacher", "init_args", "path"))) or {}
        for arguments in (node.get("init_args"), node.get("dict_kwargs")):
            if isinstance(arguments, dict) and isinstance(arguments.get("num_classes"), int):
                return int(arguments["num_classes"])
        return 0

    @staticmethod
    def _trained_network(name: object) -> Node | None:
        """Return the network that a run has trained, or that a checkpoint contains, without files of its weights."""
        if not isinstance(name, str):
            return None
        file = Path(name).expanduser()
        return _network_of_file(file) if file.is_file() else _network_of_run(name)

    @property
    def _has_teacher_file(self) -> bool:
        return "--model.teacher.path" in self.flags

    def _class_at(self, position: Position) -> object:
        """Return the class of the network at a position, before it is replaced by a short name."""
        found: object = None
        for source in self.sources:
            node = _get(source.content, position) if source.content else None
            if isinstance(node, dict) and "class_path" in node:
                found = node["class_path"]
            elif isinstance(node, str) and not is_short_name(node) and source.words[0] != "-c":
                found = node if is_from_checkpoint(node) or "replace_head" in node else found
        return found


def _stripped(node: Node) -> Node:
    stripped = strip_pretrained(node)
    assert isinstance(stripped, dict)
    return stripped


def _check_teaches(name: str, num_classes: int | None) -> None:
    """Make sure that a teacher which is not loaded from a file has weights for the classes of the data."""
    if not has_weights(name):
        raise UserError(
            f"model.teacher: {name} has random weights, from which nothing can be learned; add @pretrained, or name "
            "its trained checkpoint with --teacher FILE."
        )
    published = published_classes(name)
    if num_classes is not None and published not in (None, num_classes):
        raise UserError(
            f"model.teacher: the weights of {name} have {published} classes and the data {num_classes}, so its head "
            "would be random; train it on the data first (as photos/finetune does), and name that run with --teacher."
        )


def _needs_nothing(named: Callable[..., object]) -> bool:
    """Return whether a class or function builds a network from the number of classes, or from nothing."""
    with suppress(TypeError, ValueError):
        parameters = inspect.signature(named).parameters.values()
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [one.name for one in parameters if one.default is one.empty and one.kind not in kinds]
        return set(needed) <= {"num_classes"}
    return False


def _network_of_file(file: Path) -> Node | None:
    """Return the network that a checkpoint of a run describes, if what it names may be imported for a file."""
    with suppress(UserError):  # of files of others, and of weights alone; those that are damaged are reported later
        saved = Checkpoint.of_run(file).hyper_parameters
        described = strip_pretrained(saved.get("student") or saved.get("network"))
        if isinstance(described, dict) and "class_path" in described:
            check_trusted_classes(described, str(file))
            referenced_classes(described, str(file))
            return described
    return None


def _network_of_run(name: str) -> Node | None:
    """Return the network that a run has trained, as its ``config.yaml`` names it, without the files of its weights."""
    try:
        run = Run.find(name)
        arguments = run.configuration["model"].get("init_args") or {}
    except (MissingFileError, UserError):
        return None  # find_teacher reports it
    described = strip_pretrained(arguments.get("student") or arguments.get("network"))
    if not isinstance(described, dict) or "class_path" not in described:
        return None
    import_classes(described, str(run.config_file))
    echo_imported(str(run.config_file), imported_packages(class_paths(described, strings=False)))
    return described


def _is_recipe(name: object) -> bool:
    from kd_lightning.recipes import recipe_names

    return name in recipe_names()


def _from_checkpoints(value: Any, position: Position) -> Iterator[tuple[Position, Node]]:
    """Yield the nodes of a configuration that load a file, with their positions; none of those in lists."""
    if not isinstance(value, dict):
        return
    if is_from_checkpoint(value.get("class_path")) and isinstance(value.get("init_args"), dict):
        yield position, value
        return
    for key, item in value.items():
        yield from _from_checkpoints(item, (*position, str(key)))


def _get(content: Any, position: Position) -> Any:
    for key in position:
        if not isinstance(content, dict):
            return None
        content = content.get(key)
    return content


def _merge(*contents: Any) -> Any:
    """Return nested plain data in which later ones override earlier ones, as jsonargparse does it."""
    return reduce(overridden, contents, {})
