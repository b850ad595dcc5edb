"""The API reference: every exported name has an example that runs, and no reference leads to nothing."""

import importlib.util
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "scripts/api_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_exported_name_has_an_example_that_runs(script: types.ModuleType) -> None:
    """The examples run as doctests of the package's own files."""
    names = [
        (module.__name__, name, getattr(module, name))
        for module in script.modules()
        for name in script.exported(module)
    ]
    assert len(names) > 110
    without = [f"{module}.{name}" for module, name, found in names if ">>>" not in (inspect.getdoc(found) or "")]
    assert not without, f"{len(without)} of {len(names)} have no example: {', '.join(without)}"


def test_no_reference_leads_to_nothing(script: types.ModuleType) -> None:
    assert [found for module in script.modules() for found in script.broken_references(module)] == []


def test_a_broken_reference_is_found(script: types.ModuleType) -> None:
    module = types.ModuleType("mine", ":func:`resnet20`, :class:`kd_lightning.losses.HardTargetLoss`, :func:`renset20`")
    assert list(script.broken_references(module)) == [("mine", "renset20")]


@pytest.mark.slow
def test_it_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = [sys.executable, str(ROOT / "scripts/api_reference.py"), str(tmp_path / "api")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "DistillationModule" in (tmp_path / "api/kd_lightning.html").read_text()
    assert "soft_target_loss" in (tmp_path / "api/kd_lightning/losses.html").read_text()
