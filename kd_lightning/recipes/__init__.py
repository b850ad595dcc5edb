"""Recipes: packaged YAML files, found by name."""

from difflib import get_close_matches
from pathlib import Path

_FOLDER = Path(__file__).parent
_BASE = "_base"


def recipe_names() -> list[str]:
    """The names of all recipes, for example ``digits/distill``."""
    files = sorted(_FOLDER.glob("*/*.yaml"))
    return [f"{file.parent.name}/{file.stem}" for file in files if file.stem != _BASE]


def recipe_files(name: str) -> list[Path]:
    """The files of a recipe in the order in which they are read: what its folder shares, then its own.

    Raises:
        ValueError: If there is no such recipe; the message lists those with near names.

    Example:
        >>> [file.name for file in recipe_files("digits/distill")]
        ['_base.yaml', 'distill.yaml']
    """
    names = recipe_names()
    if name not in names:
        near = get_close_matches(name, names, cutoff=0.4) or names
        raise ValueError(
            f"{name!r} is neither a file nor a recipe; near ones are {', '.join(near)} "
            "(`kd-lightning recipes` lists all)."
        )
    own = _FOLDER / f"{name}.yaml"
    return [own.with_name(f"{_BASE}.yaml"), own]


def describe(name: str) -> str:
    """A recipe in one line: its file's first comment."""
    with recipe_files(name)[-1].open() as file:
        return file.readline().removeprefix("#").strip()


def recipes() -> None:
    """List the recipes that `-c` takes by name, with a line each."""
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {describe(name)}")
