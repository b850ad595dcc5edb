import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.cli.compare import compare
from kd_lightning.runs.run import newest_run, resolve_checkpoint, run_of

TITLES = "| run | parameters | file (MB) | test accuracy | agreement | images/s |"


def checkpoint(run: Path, name: str = "best.ckpt", age: int = 0) -> Path:
    path = run / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    return path


def run_with_figures(run: Path, **figures: Any) -> Path:
    checkpoint(run)
    defaults = {"parameters": 1514, "accuracy": 0.96111, "images_per_second": 12345.6}
    (run / "test.json").write_text(json.dumps({**defaults, **figures}))
    return run


def test_best_and_last_are_told_apart(tmp_path: Path) -> None:
    best, last = checkpoint(tmp_path), checkpoint(tmp_path, "last.ckpt")
    assert resolve_checkpoint("best", tmp_path) == best
    assert resolve_checkpoint("last", tmp_path) == last


def test_of_several_the_newest_is_taken(tmp_path: Path) -> None:
    checkpoint(tmp_path, "best.ckpt", age=20)
    newest = checkpoint(tmp_path, "best-v2.ckpt", age=0)
    checkpoint(tmp_path, "best-v1.ckpt", age=10)
    checkpoint(tmp_path, "last.ckpt", age=-10)
    (tmp_path / "checkpoints" / "best.txt").touch()
    assert resolve_checkpoint("best", tmp_path) == newest


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_run_without_one_is_refused(tmp_path: Path, which: str) -> None:
    checkpoint(tmp_path, "epoch=3.ckpt")
    with pytest.raises(
        FileNotFoundError, match=f"holds no '{which}' checkpoint; give the path of a file to --ckpt_path"
    ):
        resolve_checkpoint(which, tmp_path)
    with pytest.raises(FileNotFoundError, match="missing' holds no"):
        resolve_checkpoint(which, tmp_path / "missing")


def test_the_newest_run_is_counted_and_not_sorted_by_letters(tmp_path: Path) -> None:
    for version in (2, 10, 9):
        checkpoint(tmp_path / f"version_{version}")
    assert newest_run(tmp_path) == tmp_path / "version_10"


def test_runs_without_checkpoints_are_skipped(tmp_path: Path) -> None:
    checkpoint(tmp_path / "version_1")
    checkpoint(tmp_path / "other_7")
    (tmp_path / "version_2").mkdir()
    (tmp_path / "version_3" / "checkpoints").mkdir(parents=True)
    assert newest_run(tmp_path) == tmp_path / "version_1"


@pytest.mark.parametrize("folder", [".", "missing"])
def test_no_finished_run(tmp_path: Path, folder: str) -> None:
    (tmp_path / "version_0").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished run; run `kd-lightning fit` first, or name a file"):
        newest_run(tmp_path / folder)


def test_a_folder_that_is_no_number_is_skipped(tmp_path: Path) -> None:
    checkpoint(tmp_path / "version_0")
    checkpoint(tmp_path / "version_0_backup")
    assert newest_run(tmp_path) == tmp_path / "version_0"


def test_the_run_of_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "version_0")
    assert run_of(path) is None  # no config.yaml: not a run of the command line
    (tmp_path / "version_0" / "config.yaml").touch()
    assert run_of(path) == tmp_path / "version_0"
    moved = tmp_path / "version_0" / "best.ckpt"
    moved.touch()
    assert run_of(moved) is None
    assert run_of(Path("best.ckpt")) is None


def test_compare_prints_a_table_and_writes_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run_with_figures(Path("a"), file_bytes=1_234_567)
    run_with_figures(Path("b"), parameters=21_282_122, accuracy=1.0, agreement=0.98765, images_per_second=7.4)
    compare(["a", "b"], output="deep/table.md")
    assert Path("deep/table.md").read_text().splitlines() == [
        TITLES,
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a | 1,514 | 1.235 | 96.11% | - | 12,346 |",
        "| b | 21,282,122 | - | 100.00% | 98.77% | 7 |",
    ]
    printed = capsys.readouterr().out
    for text in ("test accuracy", "images/s", "1,514", "1.235", "96.11%", "98.77%", "21,282,122", "12,346"):
        assert text in printed
    assert printed.endswith("The table is in deep/table.md.\n")


def test_compare_writes_no_file_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_figures(Path("a"))
    compare(["a"])
    assert "96.11%" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_compare_takes_the_newest_run_of_a_recipe_or_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logs = Path("lightning_logs/digits/distill")
    run_with_figures(logs / "version_9", accuracy=0.1111)
    run_with_figures(logs / "version_10", accuracy=0.2222)
    compare(["digits/distill", str(logs), f"{logs}/version_9"], output="t.md")
    rows = Path("t.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == ["22.22%", "22.22%", "11.11%"]
    assert rows[0].startswith("| digits/distill |")


def test_compare_says_which_run_was_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_figures(Path("a"))
    checkpoint(Path("lightning_logs/digits/teacher/version_0"))
    run = "lightning_logs/digits/teacher/version_0"
    with pytest.raises(FileNotFoundError, match=f"^'{run}' was not tested yet; run `kd-lightning test -c {run}/config"):
        compare(["a", "digits/teacher"], output="t.md")
    assert not Path("t.md").exists()
    with pytest.raises(FileNotFoundError, match="'lightning_logs/digits/none' holds no finished run"):
        compare(["digits/none"])


def test_compare_says_that_a_run_that_is_named_was_not_tested(tmp_path: Path) -> None:
    checkpoint(tmp_path / "version_0")
    with pytest.raises(FileNotFoundError, match="version_0' was not tested yet"):
        compare([str(tmp_path / "version_0")])


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, kd_lightning.runs.run; print([m for m in ('torch', 'lightning', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
