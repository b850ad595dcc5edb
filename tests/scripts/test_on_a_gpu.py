"""`scripts/on_a_gpu.sh` runs every stage, whatever the others do, and writes what each printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/on_a_gpu.sh"
STAGES = re.findall(r'(?m)^    "(\d+) (\S+) (.+)"$', SCRIPT.read_text())
NAMES = [name for _, name, _ in STAGES]


def measure(folder: Path, python: Path | str, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "PYTHON": str(python), **variables}
    command = ["bash", str(SCRIPT), *options]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that prints its arguments and the path of modules; it fails in two of the stages."""
    file = tmp_path / "python"
    file.write_text(
        '#!/usr/bin/env bash\nprintf "<%s>\\n" "$@"\necho "path: $PYTHONPATH"\n'
        'case "$*" in *bench_graph*) echo broken >&2; exit 3;; *overhead*) kill -9 $$;; esac\n'
    )
    file.chmod(0o755)
    return file


def test_the_limits_add_up_to_less_than_ten_minutes() -> None:
    assert len(STAGES) >= 9
    assert len(set(NAMES)) == len(NAMES)
    assert sum(int(seconds) for seconds, *_ in STAGES) < 600


def test_every_stage_runs_although_others_fail(tmp_path: Path, python: Path) -> None:
    run = measure(tmp_path, python, "results")
    assert run.returncode == 1
    summary = [line.split() for line in (tmp_path / "results/summary.txt").read_text().splitlines()]
    codes = {words[0]: int(words[-1]) for words in summary}
    assert list(codes) == NAMES
    assert {name: code for name, code in codes.items() if code} == {"graph-128": 3, "graph-512": 3, "overhead": 137}
    assert "broken" in (tmp_path / "results/graph-128.txt").read_text()
    everything = (tmp_path / "results/all.txt").read_text()
    for name in NAMES:
        assert (tmp_path / f"results/{name}.txt").read_text() in everything
    assert everything in run.stdout + run.stderr


def test_arguments_and_modules(tmp_path: Path, python: Path) -> None:
    measure(tmp_path, python, OUT="out folder", PYTHONPATH="elsewhere")
    printed = (tmp_path / "out folder/tests.txt").read_text().splitlines()
    assert printed == [
        *("<-u>", "<-m>", "<pytest>", "<-m>", "<gpu and not slow>", "<-q>", "<tests>"),
        f"path: {SCRIPT.parents[1]}:elsewhere",
    ]
    assert "<cuda>" in (tmp_path / "out folder/epoch.txt").read_text()


def test_a_stage_of_a_former_run_is_replaced(tmp_path: Path, python: Path) -> None:
    for _ in range(2):
        measure(tmp_path, python, "results")
    assert len((tmp_path / "results/summary.txt").read_text().splitlines()) == len(NAMES)


def test_the_scripts_exist() -> None:
    for *_, arguments in STAGES:
        script = arguments.split()[0]
        assert script == "-m" or (SCRIPT.parents[1] / script).is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_a_cpu(tmp_path: Path) -> None:
    run = measure(tmp_path, sys.executable, "--device", "cpu", "results", PYTHONPATH="")
    assert run.returncode == 0, run.stdout
    assert "competent loop" in (tmp_path / "results/step.txt").read_text()
    assert "of the hardware" in (tmp_path / "results/graph-128.txt").read_text()
    assert "skipped" in (tmp_path / "results/tests.txt").read_text()
