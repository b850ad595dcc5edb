"""Recipes: packaged YAML files, found by name, and methods that several folders share with their own networks."""

import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from string import Template

import yaml

from kd_lightning.errors import MissingFileError, UserError

_FOLDER = Path(__file__).parent
_METHODS = _FOLDER / "_methods"
_BASE, _NETWORKS, _DISTILL, _COMPRESS = "_base.yaml", "_networks.yaml", "distill.yaml", "_compress.yaml"
_WITHOUT_TEACHER = ("teacher", "student", "finetune", "probe")
_FORMER = {"folder": "photos", "transfer": "photos"}
"""Folders of earlier versions, and those in their place."""


def recipe_names() -> list[str]:
    """Return the names of all recipes, for example ``digits/distill``."""
    return [f"{folder.name}/{name}" for folder in _folders() for name in _names_in(folder)]


def recipe_texts(name: str) -> list[str]:
    """Return the configurations of a recipe, as YAML, in the order in which a later one overrides an earlier one.

    They are what its folder shares; for a distillation the two networks of the folder's ``distill``; and its own file:
    one of the folder, or a method of ``_methods`` with the networks of the folder.

    Raises:
        ValueError: If there is no such recipe; the message lists those with near names.

    Example:
        >>> [text.splitlines()[0][:24] for text in recipe_texts("digits/dkd")]
        ['seed_everything: 0', '# A student of 1,500 par', '# Decoupled knowledge di']
    """
    folder = _FOLDER / name.partition("/")[0]
    return [_filled(file, folder) for file in recipe_files(name)]


def recipe_files(name: str) -> list[Path]:
    """Return the files of a recipe, not filled in.

    Raises:
        ValueError: If there is no such recipe; the message lists those with near names.

    Example:
        >>> [file.name for file in recipe_files("cifar100/dkd")]
        ['_base.yaml', 'distill.yaml', 'dkd.yaml']
    """
    names = recipe_names()
    if name not in names:
        _check_former(name)
        near = get_close_matches(name, names, cutoff=0.4) or names
        raise UserError(
            f"{name!r} is neither a file nor a recipe; near ones are {', '.join(near)} "
            "(`kd-lightning recipes` lists all)."
        )
    folder, own = _FOLDER / name.partition("/")[0], f"{name.partition('/')[2]}.yaml"
    shared = [folder / _BASE]
    if _has_methods(folder) and Path(own).stem not in _WITHOUT_TEACHER:
        shared.append(_METHODS / _DISTILL)
    last = folder / own if (folder / own).is_file() else _METHODS / own
    return list(dict.fromkeys([*shared, last]))


def describe(name: str) -> str:
    """Return a recipe's first comment, which describes it in one line."""
    return recipe_texts(name)[-1].partition("\n")[0].removeprefix("#").strip()


def is_shared(name: str) -> bool:
    """Return whether all folders with networks have the recipe, with the same description."""
    file = recipe_files(name)[-1]
    return file.parent == _METHODS and "$" not in file.read_text().partition("\n")[0]


def method_folders() -> list[str]:
    """Return the names of the folders that have networks, and so a recipe for every method."""
    return [folder.name for folder in _folders() if _has_methods(folder)]


def compress_stages(name: str) -> tuple[Path, dict[str, str]]:
    """Return the file of a chain's stages, and what is filled in there.

    Args:
        name: YAML file of stages, or folder of recipes.

    Raises:
        FileNotFoundError: If there is neither.

    Example:
        >>> file, values = compress_stages("cifar10")
        >>> file.name, values["folder"]
        ('_compress.yaml', 'cifar10')
    """
    if Path(name).is_file():
        return Path(name), {}
    if name not in method_folders():
        _check_former(name)
        raise MissingFileError(
            f"{name!r} is neither a YAML file of stages nor a folder of recipes with a chain "
            f"({', '.join(method_folders())})."
        )
    own = _FOLDER / name / _COMPRESS
    as_packaged = dict.fromkeys(("teacher_network", "student_network", "student_option"), "")
    values = {"folder": name, "teacher_run": _values(_FOLDER / name)["teacher_run"], **as_packaged}
    return own if own.is_file() else _FOLDER / _COMPRESS, values


def _check_former(name: str) -> None:
    """Name the recipe in the place of one of an earlier version.

    Raises:
        UserError: If there is one.
    """
    folder, slash, method = name.partition("/")
    if folder in _FORMER:
        new = f"{_FORMER[folder]}{slash}{method}"
        known = new in [*recipe_names(), *method_folders()]
        raise UserError(
            f"The recipes of {folder}/ are those of {_FORMER[folder]}/ now, which need no number of classes and no "
            f"size: type -c {new if known else _FORMER[folder] + '/finetune'}."
        )


def _filled(file: Path, folder: Path) -> str:
    """Return a file's text with the names that begin with ``$`` replaced by the folder's networks and words."""
    return Template(file.read_text()).substitute(_values(folder))


@cache
def _values(folder: Path) -> dict[str, str]:
    """Return what a folder fills in: words as they are, all else as YAML in one line."""
    if not _has_methods(folder):
        return {}
    values = yaml.safe_load((folder / _NETWORKS).read_text())
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {"folder": folder.name, **texts}


def _has_methods(folder: Path) -> bool:
    return (folder / _NETWORKS).is_file()


def _folders() -> list[Path]:
    return sorted(file.parent for file in _FOLDER.glob(f"*/{_BASE}"))


def _names_in(folder: Path) -> list[str]:
    methods = list(_METHODS.glob("*.yaml")) if _has_methods(folder) else []
    return sorted({file.stem for file in [*folder.glob("*.yaml"), *methods] if not file.name.startswith("_")})
