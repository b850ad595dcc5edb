"""Imports run one way, and what needs no Lightning does not load it."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kd_lightning.export

PACKAGE = Path(kd_lightning.__file__).parent
# each may import from those before it, and from its own line
ORDER = [
    {"errors"},
    {"files", "lazy_names", "recipes"},
    {"features", "networks"},
    {"checkpoints"},
    {"losses", "data"},
    {"teacher"},
    {"callbacks"},
    {"modules"},
    {"export"},
    {"runs"},
    {"report"},
    {"cli"},
    {"__main__"},
]


def _allowed(room: str) -> set[str]:
    level = next(level for level, rooms in enumerate(ORDER) if room in rooms)
    return set().union(*ORDER[: level + 1])


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    room = _room(file)
    if room == "__init__":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "kd_lightning" and len(parts) > 1:
                assert parts[1] in _allowed(room), f"{file} imports {name}"


def _loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("room", ["losses", "networks", "features"])
def test_plain_torch_stays_free_of_lightning(room: str) -> None:
    assert not {"lightning", "pytorch_lightning"} & _loaded_by(f"import kd_lightning.{room}")


def test_the_package_loads_nothing_until_it_is_used() -> None:
    assert not {"torch", "lightning"} & _loaded_by("import kd_lightning")


def test_the_public_modules_do_not_load_sklearn() -> None:  # torchmetrics itself loads matplotlib
    statement = "import kd_lightning; [getattr(kd_lightning, name) for name in kd_lightning.__all__]"
    assert "sklearn" not in _loaded_by(statement)


def test_an_exported_file_runs_without_torch() -> None:
    assert not {"torch", "lightning"} & _loaded_by(
        "from kd_lightning.cli.classify import classify; from kd_lightning.export import OnnxClassifier"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["runs", "."],
        ["completion", "--", "fit", "-"],
        ["completion", "--", "export", "-"],
        *([command, "--help"] for command in ("fit", "classify", "compare", "compress", "runs")),
    ],
)
def test_help_and_recipes_need_no_torch(arguments: list[str]) -> None:
    statement = (
        f"import sys, contextlib, io; sys.argv = ['kd-lightning', *{arguments}]\n"
        "from kd_lightning.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        "import sys"
    )
    assert not {"torch", "lightning"} & _loaded_by(statement)


@pytest.mark.parametrize("package", [kd_lightning, kd_lightning.export], ids=lambda package: package.__name__)
def test_every_public_name_can_be_had(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
