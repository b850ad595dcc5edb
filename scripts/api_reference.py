"""Build the API reference from the docstrings with pdoc; warnings and references to nothing are errors.

python scripts/api_reference.py [FOLDER]    (pip install ".[docs]"; the default is lightning_logs/api)
"""

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import kd_lightning

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`~?([\w.]+)`")


def main() -> None:
    """Check the references in all docstrings, and write a page for each module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("lightning_logs/api"))
    folder: Path = parser.parse_args().folder
    broken = [f"{place}: {name} is not found" for module in modules() for place, name in broken_references(module)]
    if broken:
        sys.exit("\n".join(broken))
    try:
        build(folder)
    except Warning as warning:
        sys.exit(f"pdoc warns: {warning}")
    print(f"The reference is {folder / 'index.html'}.")


def build(folder: Path) -> None:
    """Write the pages; every warning is raised as an error."""
    import pdoc
    import pdoc.render

    for module in modules():  # pdoc looks for names that are imported when they are first used in the module itself
        vars(module).update({name: getattr(module, name) for name in exported(module)})
    pdoc.render.configure(docformat="google", show_source=True, math=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        pdoc.pdoc(*(module.__name__ for module in modules() if exported(module)), output_directory=folder)


def exported(module: ModuleType) -> list[str]:
    """Return the names that a module exports; a package without any is internal and gets no page."""
    return list(getattr(module, "__all__", ()))


def modules() -> Iterator[ModuleType]:
    """Yield the package and all modules in it."""
    yield kd_lightning
    for found in pkgutil.walk_packages(kd_lightning.__path__, "kd_lightning."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def broken_references(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield the place and the name of each reference in a module's docstrings that leads to nothing."""
    yield from ((module.__name__, name) for name in _missing(module.__doc__, module, None))
    for _, member in inspect.getmembers(module, lambda one: getattr(one, "__module__", None) == module.__name__):
        place = f"{module.__name__}.{getattr(member, '__qualname__', '')}"
        owner = member if inspect.isclass(member) else None
        yield from ((place, name) for name in _missing(getattr(member, "__doc__", None), module, owner))
        for name, part in vars(member).items() if owner else ():
            part = getattr(part, "fget", None) or getattr(part, "func", None) or part
            if inspect.isfunction(part):
                yield from ((f"{place}.{name}", found) for found in _missing(part.__doc__, module, owner))


def _missing(text: str | None, module: ModuleType, owner: type | None) -> Iterator[str]:
    for name in ROLE.findall(text or ""):
        if not any(_resolves(name, place) for place in (owner, module, *_public())):
            yield name


def _public() -> Iterator[ModuleType]:
    """Yield the packages whose exported names are used without a prefix."""
    names = ("", ".callbacks", ".data", ".export", ".losses", ".modules", ".networks", ".runs.run")
    yield from (importlib.import_module(f"kd_lightning{name}") for name in names)


def _resolves(name: str, place: object) -> bool:
    """Return whether a dotted name leads to an object from some module or class, or is importable as it is."""
    if place is None:
        return False
    found = place
    for part in name.split("."):
        if not hasattr(found, part):
            return name.partition(".")[0] != name and _importable(name)
        found = getattr(found, part)
    return True


def _importable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
