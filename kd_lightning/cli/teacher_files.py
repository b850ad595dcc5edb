"""Files of trained networks that a configuration names, found before anything is built."""

from collections.abc import Iterator
from pathlib import Path

from jsonargparse import Namespace

from kd_lightning.checkpoints.trust import is_from_checkpoint, without_download
from kd_lightning.errors import MissingFileError
from kd_lightning.recipes import recipe_names
from kd_lightning.runs.moved import moved_file
from kd_lightning.runs.run import Run, find_checkpoint


def find_teacher(options: Namespace, command: str, run: Run | None = None) -> Iterator[str]:
    """Fill in the path of the teacher, and of what a student takes from it, where a run or recipe is named.

    A missing file is an error in ``fit``; in ``layers`` an untrained network of the same shape replaces it. The other
    commands need no teacher: it is left out, and a student gets all its weights from its own checkpoint.

    Args:
        options: Arguments of the module, which are changed.
        command: Name of the command, for example ``"fit"``.
        run: The run that is resumed or evaluated, which knows the digests of its teacher's files.

    Yields:
        Sentences that report what was filled in or left out.

    Raises:
        FileNotFoundError: If a file that ``fit`` needs is missing.
    """
    teachers = list(_from_checkpoints(options.get("teacher")))
    missing = None
    for node in teachers:
        name = node.init_args.path
        try:
            node.init_args.path = str(find_checkpoint(name))
        except MissingFileError as error:
            moved = moved_file(name, run)
            if moved is None:
                missing = str(error)
            else:
                node.init_args.path = str(moved)
                yield f"{name} has moved: {moved} has the same digest."
        if node.init_args.path != name:
            yield f"The teacher is {node.init_args.path}."
    if missing and command == "fit":
        raise MissingFileError(f"{missing.rstrip('.')}, or name its checkpoint with --teacher FILE.")
    for node in _from_checkpoints(options.get("student")):
        if teachers and node.init_args.path in recipe_names():
            node.init_args.path = teachers[0].init_args.path
    if command != "fit":
        yield from _leave_out(options, missing, command)


def teacher_paths(options: Namespace) -> list[str]:
    """Return the paths of the files that the teacher is loaded from."""
    return [str(node.init_args.path) for node in _from_checkpoints(options.get("teacher"))]


def leave_out_downloads(options: Namespace) -> None:
    """Let the trained network be built without published weights, since a checkpoint has all of its weights.

    Args:
        options: Arguments of the module, which are changed.
    """
    for name in ("network", "student"):
        _leave_out_weights(options.get(name))


def _leave_out_weights(node: object) -> None:
    if isinstance(node, list):
        for item in node:
            _leave_out_weights(item)
    if not isinstance(node, Namespace):
        return
    given = node.get("init_args")
    values = vars(given) if isinstance(given, Namespace) else {}
    for argument, value in without_download(str(node.get("class_path")), values).items():
        for arguments in (given, node.get("dict_kwargs")):
            if arguments is not None and argument in arguments:
                arguments[argument] = value
    for item in list(values.values()):
        _leave_out_weights(item)


def _leave_out(options: Namespace, missing: str | None, command: str) -> Iterator[str]:
    for node in _from_checkpoints([options.get("student"), options.get("teacher") if command == "layers" else None]):
        if not Path(node.init_args.path).expanduser().is_file():
            network = node.init_args.network
            for name in list(vars(node)):
                del node[name]
            node.update(network)
    if missing and command != "layers":
        options["teacher"] = None
        yield f"{missing} Until then, agreement with the teacher is left out."


def _from_checkpoints(node: object) -> Iterator[Namespace]:
    if isinstance(node, list):
        for item in node:
            yield from _from_checkpoints(item)
    elif isinstance(node, Namespace):
        if is_from_checkpoint(node.get("class_path")) and node.get("init_args.path"):
            yield node
        else:
            yield from _from_checkpoints(list(vars(node).values()))
