"""jsonargparse's errors about options and YAML keys, in one sentence with the nearest name."""

import inspect
import re
from argparse import ArgumentError
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser

from kd_lightning.cli.errors import causes, one_line
from kd_lightning.errors import UserError

_TRAINED = {"student": "network", "network": "student"}
"""What the trained network is called in a distillation and elsewhere, and the other way round."""
_PACKAGES = ("kd_lightning", "lightning", "torch")


@contextmanager
def explain_parse_errors(parsers: Iterable[ArgumentParser]) -> Iterator[None]:
    """Turn an error of jsonargparse, which lists all types that it tried, into a user's error.

    Args:
        parsers: Parsers of the command, made with ``exit_on_error=False``.

    Raises:
        UserError: One sentence that names the option or YAML key, and the nearest name that exists.
    """
    try:
        yield
    except ArgumentError as error:
        options = [action for parser in parsers for action in parser._actions]
        names = ["--teacher", *(name for action in options for name in (*action.option_strings, action.dest))]
        known = [name for name in names if not name.endswith(".help")]
        raise UserError(_sentence(error, known)) from error


def _sentence(error: BaseException, known: list[str]) -> str:
    """Return the reason, which is the innermost of an error's causes, and the value that it is about."""
    chain = list(causes(error))
    key, owner, reason = _key(chain), _owner(chain), str(chain[-1])
    if found := re.search(r"Option '([^']+)' is not accepted", reason):
        return _unknown_argument(found[1], key, owner, known)
    if found := re.search(r"does not accept option '([^']+)'", reason):
        return f"There is no option {found[1]!r}{_nearest_option(found[1], known)}."
    if found := re.match(r"unrecognized arguments: (.*)", reason, re.DOTALL):
        words = found[1].split()
        flags = [word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")]
        return _unknown_argument(flags[0], key, owner, known) if owner and flags else _unknown_words(words, known)
    if (found := re.search(r'Unable to load config "(.*)"$', reason)) and owner:
        return _no_group(found[1], key, owner)
    if found := re.search(r"Got value: (.*)", reason, re.DOTALL):
        union = str(chain[-2]) if "Errors:" in str(chain[-2]).partition("Parser key")[0] else ""
        return _wrong_type(key, found[1], union or reason)
    return _unknown_class(key, chain) or f"{key}: {one_line(chain[-1])[:300].rstrip('.')}.".removeprefix(": ")


def _key(chain: list[BaseException]) -> str:
    """Return the dotted name of the value; each parser of a class adds a part."""
    keys = [re.match(r'Parser key "([^"]+)"', str(error)) for error in chain if isinstance(error, ArgumentError)]
    parts = [found[1] for found in keys if found]
    return ".".join(part for part, before in zip(parts, ["", *parts], strict=False) if part != before)


def _owner(chain: list[BaseException]) -> str:
    """Return the import path of the class whose arguments were parsed last."""
    pattern = re.compile(r"Problem with given class_path '([^']+)'|.*Namespace\(class_path='([^']+)'")
    found = [match[1] or match[2] for match in map(pattern.match, map(str, chain)) if match]
    return found[-1] if found else ""


def _unknown_class(key: str, chain: list[BaseException]) -> str:
    """Return a sentence about a class or module that does not exist; an empty string for other reasons."""
    reason = chain[-1]
    if found := re.search(r"Expected a dot import path string: (.*)", str(reason)):
        near = _nearest(found[1], _subclasses("".join(str(error) for error in chain if "Subtypes: " in str(error))))
        return f"{key}: {found[1]!r} is not a class; give its import path, as in {near or 'package.Class'}."
    if isinstance(reason, ModuleNotFoundError):
        near = _addition(_nearest(str(reason.name), [file.stem for file in Path.cwd().glob("*.py")]))
        return (
            f"{key}: there is no module {reason.name!r}{near}; install it, or run the command in the folder that "
            "contains it."
        )
    if isinstance(reason, AttributeError) and isinstance(reason.obj, ModuleType):
        near = _addition(_nearest(str(reason.name), dir(reason.obj)))
        return f"{key}: {reason.obj.__name__} has no {reason.name!r}{near}."
    return ""


def _unknown_argument(name: str, key: str, owner: str, known: list[str]) -> str:
    name = name.partition(".init_args.")[0]  # of a network by its short name, which was written out
    where = f"{key}.{name}" if key else name
    if not owner:
        return f"There is no option {where!r}{_nearest_option(where, known)}."
    if name.endswith(".class_path"):
        return f"{where.removesuffix('.class_path')}: there is no such class, or it does not fit here; check its name."
    accepted = argument_names(owner)
    groups = ", ".join(dict.fromkeys(argument.partition(".")[0] for argument in accepted))
    other = _TRAINED.get(name, "")
    near = _addition(other if other in accepted else _nearest(name, accepted))
    if not near and _passes_on(owner, accepted):
        near = f"; set {key}.dict_kwargs.{name} if it is for what {owner} calls"
    return f"{where} is not an argument of {owner}{near or (f'; it takes {groups}' if groups else '')}."


def _no_group(value: str, key: str, owner: str) -> str:
    """Return a sentence about a value that was given for a group of settings."""
    fields = [name for name in argument_names(owner) if name.startswith(f"{key.rpartition('.')[2]}.")]
    example = f", as in --{key}.{fields[0].rpartition('.')[2]}={value}" if fields else ""
    return f"{key} is a group of settings, got {value!r}; set them one by one{example}."


def _unknown_words(words: list[str], known: list[str]) -> str:
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        return f"{' '.join(words)!r} is not used by the command; options begin with --."
    return f"There is no option {flag}{_nearest_option(flag, [name for name in known if name.startswith('-')])}."


def _wrong_type(key: str, value: str, expected: str) -> str:
    choices = [choice for found in re.findall(r"Literal\[([^]]+)\]", expected) for choice in found.split(", ")]
    kinds = re.findall(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", expected)
    names = ["null" if kind == "NoneType" else kind for kind in kinds]
    near = _addition(_nearest(value, [choice.strip("'") for choice in choices]))
    return f"{key} must be {' or '.join(dict.fromkeys([*choices, *names]))}, got {value.strip()!r}{near}."


def _nearest_option(name: str, known: list[str]) -> str:
    """Return the addition that names the nearest option, or the nearest section of an option."""
    if near := _nearest(name, known):
        return _addition(near)
    section = name.partition(".")[0]
    near = _nearest(section, [option.partition(".")[0] for option in known])
    return f"; the nearest to {section} is {near}" if near else ""


def _addition(near: str) -> str:
    return f"; the nearest is {near}" if near else ""


def _nearest(name: str, known: Collection[str]) -> str:
    """Return the nearest of some names, an empty string where none is near.

    Example:
        >>> _nearest("num_class", ["num_classes", "widths"]), _nearest("lr", ["layers", "learning_rate"])
        ('num_classes', 'learning_rate')
        >>> _nearest("AdmaW", ["torch.optim.AdamW", "torch.optim.SGD"]), _nearest("x", ["y"])
        ('torch.optim.AdamW', '')
    """
    longer = [known_name for known_name in known if len(name) > 2 and known_name.lower().startswith(name.lower())]
    if len(longer) == 1:
        return longer[0]
    for part in (str, lambda known_name: known_name.rpartition(".")[2], _initials):
        names = {part(known_name).lower(): known_name for known_name in known}
        found = get_close_matches(name.lower(), names, n=1, cutoff=1.0 if part is _initials else 0.7)
        if found:
            return names[found[0]]
    return ""


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.split("_")) if "_" in name else ""


def argument_names(class_path: str) -> list[str]:
    """Return the names of the arguments of a class or function."""
    from kd_lightning.checkpoints.trust import resolve  # imports torch, which not every command needs

    named, parser = resolve(class_path), ArgumentParser(exit_on_error=False)
    with suppress(Exception):  # only to suggest names
        add: Any = parser.add_class_arguments if isinstance(named, type) else parser.add_function_arguments
        add(named, fail_untyped=False)
        return [action.dest for action in parser._actions if not action.dest.endswith("help")]
    return []


def _passes_on(function: str, accepted: list[str]) -> bool:
    """Return whether a function passes on further arguments, of which jsonargparse did not find the names."""
    from kd_lightning.checkpoints.trust import resolve

    with suppress(TypeError, ValueError):  # no callable, or one without a signature
        parameters = inspect.signature(resolve(function)).parameters  # type: ignore[arg-type]
        kinds = [parameter.kind for parameter in parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds and set(accepted) <= set(parameters)
    return False


def _subclasses(types: str) -> list[str]:
    """Return the import paths of the classes that could be given for types, as far as they were imported."""
    from kd_lightning.checkpoints.trust import import_paths, resolve

    bases: set[Any] = {resolve(name) for name in re.findall(r"[a-z_]\w*(?:\.\w+)+", types)}
    found: list[str] = []
    for base in bases:
        if isinstance(base, type) and base.__module__.startswith(_PACKAGES):
            found += [min(import_paths(kind), key=len) for kind in _all_subclasses(base)]
    return found


def _all_subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for kind in type.__subclasses__(base):
        yield kind
        yield from _all_subclasses(kind)
