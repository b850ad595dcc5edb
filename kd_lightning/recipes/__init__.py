"""Recipes: packaged YAML files, found by name."""

from difflib import get_close_matches
from pathlib import Path

from kd_lightning.errors import MissingFileError, UserError

_FOLDER = Path(__file__).parent
METHODS = _FOLDER / "_methods"
_BASE, _DISTILL, _COMPRESS = "_base.yaml", "distill.yaml", "_compress.yaml"
_ALONE = ("teacher", "student")
"""Networks that are trained on labels alone."""


def recipe_names() -> list[str]:
    """The names of all recipes, for example ``digits/distill``."""
    return [f"{folder.name}/{name}" for folder in _folders() for name in _names_in(folder)]


def recipe_files(name: str) -> list[Path]:
    """The files of a recipe in the order in which they are read; a later one overrides an earlier one.

    They are what its folder shares; for a distillation the folder's ``distill``, which names the two networks; and its
    own file: one of the folder, or a method of ``_methods``, which all folders share.

    Raises:
        ValueError: If there is no such recipe; the message lists those with near names.

    Example:
        >>> [file.name for file in recipe_files("cifar100/dkd")]
        ['_base.yaml', 'distill.yaml', 'dkd.yaml']
    """
    names = recipe_names()
    if name not in names:
        near = get_close_matches(name, names, cutoff=0.4) or names
        raise UserError(
            f"{name!r} is neither a file nor a recipe; near ones are {', '.join(near)} "
            "(`kd-lightning recipes` lists all)."
        )
    folder, own = _FOLDER / name.partition("/")[0], f"{name.partition('/')[2]}.yaml"
    distills = (folder / _DISTILL).is_file() and Path(own).stem not in _ALONE
    shared = [folder / _BASE, folder / _DISTILL] if distills else [folder / _BASE]
    last = folder / own if (folder / own).is_file() else METHODS / own
    return list(dict.fromkeys([*shared, last]))


def stages_of(name: str) -> tuple[Path, str | None]:
    """The stages of `kd-lightning compress`: of a YAML file, or those for a folder of recipes, whose name follows.

    Raises:
        FileNotFoundError: If there is neither.

    Example:
        >>> file, recipes = stages_of("cifar10")
        >>> file.name, recipes
        ('_compress.yaml', 'cifar10')
    """
    if Path(name).is_file():
        return Path(name), None
    folders = [folder.name for folder in _folders() if (folder / "prune.yaml").is_file()]
    if name not in folders:
        raise MissingFileError(
            f"{name!r} is neither a YAML file of stages nor a folder of recipes with a chain ({', '.join(folders)})."
        )
    own = _FOLDER / name / _COMPRESS
    return own if own.is_file() else _FOLDER / _COMPRESS, name


def describe(name: str) -> str:
    """A recipe in one line: its file's first comment."""
    with recipe_files(name)[-1].open() as file:
        return file.readline().removeprefix("#").strip()


def distilling_folders() -> list[Path]:
    """Return the folders that have a ``distill`` recipe, and so every method of ``_methods``."""
    return [folder for folder in _folders() if (folder / _DISTILL).is_file()]


def _folders() -> list[Path]:
    return sorted(file.parent for file in _FOLDER.glob(f"*/{_BASE}"))


def _names_in(folder: Path) -> list[str]:
    methods = list(METHODS.glob("*.yaml")) if (folder / _DISTILL).is_file() else []
    return sorted({file.stem for file in [*folder.glob("*.yaml"), *methods] if not file.name.startswith("_")})
