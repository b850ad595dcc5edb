import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_lightning import Run
from kd_lightning.cli.compare import compare
from kd_lightning.runs.run import find_checkpoint

TITLES = "| run | parameters | file (MB) | test accuracy | agreement | images/s |"


def checkpoint(run: Path, name: str = "best.ckpt", age: int = 0) -> Path:
    path = run / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    return path


def run_with_metrics(run: Path, **metrics: Any) -> Path:
    checkpoint(run)
    defaults = {"parameters": 1514, "accuracy": 0.96111, "images_per_second": 12345.6}
    (run / "test.json").write_text(json.dumps({**defaults, **metrics}))
    return run


def test_best_and_last_checkpoint(tmp_path: Path) -> None:
    best, last = checkpoint(tmp_path), checkpoint(tmp_path, "last.ckpt")
    assert Run(tmp_path).best_file == best
    assert Run(tmp_path).last_file == last


def test_of_several_the_newest_is_returned(tmp_path: Path) -> None:
    checkpoint(tmp_path, "best.ckpt", age=20)
    newest = checkpoint(tmp_path, "best-v2.ckpt", age=0)
    checkpoint(tmp_path, "best-v1.ckpt", age=10)
    checkpoint(tmp_path, "last.ckpt", age=-10)
    (tmp_path / "checkpoints" / "best.txt").touch()
    assert Run(tmp_path).best_file == newest


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_run_without_a_checkpoint_is_an_error(tmp_path: Path, which: str) -> None:
    checkpoint(tmp_path, "epoch=3.ckpt")
    message = f"does not have a '{which}' checkpoint; name the file of a checkpoint"
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=message):
            getattr(Run(folder), which)


def test_the_newest_checkpoint_has_the_most_steps_and_damaged_ones_are_skipped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.newest_checkpoint() is None
    for name, steps, age in (("best", 20, 0), ("last", 30, 20), ("last-step", 30, 10)):
        torch.save(
            {"global_step": steps, "state_dict": {}, "kd_lightning_format": 1}, checkpoint(tmp_path, f"{name}.ckpt")
        )
        os.utime(tmp_path / f"checkpoints/{name}.ckpt", (1_700_000_000 - age,) * 2)
    checkpoint(tmp_path, "damaged.ckpt")
    reasons: list[str] = []
    newest = run.newest_checkpoint(reasons.append)
    assert newest is not None
    assert newest.path == tmp_path / "checkpoints/last-step.ckpt"
    assert len(reasons) == 1
    assert "damaged.ckpt" in reasons[0]


def test_the_newest_run_is_found_by_number(tmp_path: Path) -> None:
    for version in (2, 10, 9):
        checkpoint(tmp_path / f"version_{version}")
    assert Run.newest_of(tmp_path).folder == tmp_path / "version_10"
    assert Run.find(tmp_path).folder == tmp_path / "version_10"


def test_runs_without_checkpoints_are_skipped(tmp_path: Path) -> None:
    checkpoint(tmp_path / "version_1")
    checkpoint(tmp_path / "other_7")
    checkpoint(tmp_path / "version_1_backup")
    (tmp_path / "version_2").mkdir()
    (tmp_path / "version_3" / "checkpoints").mkdir(parents=True)
    assert Run.newest_of(tmp_path).folder == tmp_path / "version_1"


@pytest.mark.parametrize("folder", [".", "missing"])
def test_a_folder_without_runs_is_an_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "version_0").mkdir()
    with pytest.raises(FileNotFoundError, match="does not contain a run with checkpoints; train one first"):
        Run.newest_of(tmp_path / folder)


def test_the_run_of_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "version_0")
    assert Run.of_checkpoint(path) is None  # no config.yaml: not a run of the command line
    (tmp_path / "version_0" / "config.yaml").touch()
    run = Run.of_checkpoint(path)
    assert run is not None
    assert run.folder == tmp_path / "version_0"
    assert Run.find(path).folder == run.folder
    moved = tmp_path / "version_0" / "best.ckpt"
    moved.touch()
    assert Run.of_checkpoint(moved) is None
    assert Run.of_checkpoint("best.ckpt") is None
    assert find_checkpoint(moved) == moved
    with pytest.raises(FileNotFoundError, match="is not in the checkpoints folder of a run"):
        Run.find(moved)


def test_a_recipe_means_its_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="'digits/teacher' is not trained yet; run `kd-lightning fit -c dig"):
        Run.find("digits/teacher")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint, run or trained recipe 'digits/none'"):
        Run.find("digits/none")
    runs = Path("lightning_logs/digits/teacher")
    checkpoint(runs / "version_0")
    best = checkpoint(runs / "version_1")
    Path("digits/teacher").mkdir(parents=True)  # not a run
    assert Run.find("digits/teacher").folder == runs / "version_1"
    assert find_checkpoint("digits/teacher") == best


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: 3"])
def test_a_damaged_configuration_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        Run(tmp_path).config  # noqa: B018
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not the configuration of a run"):
        Run(tmp_path).config  # noqa: B018


def test_a_run_of_other_data_has_no_images(tmp_path: Path) -> None:
    assert Run(tmp_path).data() is None
    (tmp_path / "config.yaml").write_text("data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}")
    assert Run(tmp_path).data() is None
    assert Run(tmp_path).images("test") is None


def test_compare_prints_a_table_and_writes_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run_with_metrics(Path("a"), file_bytes=1_234_567)
    run_with_metrics(Path("b"), parameters=21_282_122, accuracy=1.0, agreement=0.98765, images_per_second=7.4)
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


def test_compare_writes_no_file_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_metrics(Path("a"))
    compare(["a"])
    assert "96.11%" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_compare_takes_the_newest_run_of_a_recipe_or_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logs = Path("lightning_logs/digits/distill")
    run_with_metrics(logs / "version_9", accuracy=0.1111)
    run_with_metrics(logs / "version_10", accuracy=0.2222)
    compare(["digits/distill", str(logs), f"{logs}/version_9"], output="t.md")
    rows = Path("t.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == ["22.22%", "22.22%", "11.11%"]
    assert rows[0].startswith("| digits/distill |")


def test_compare_names_the_run_that_is_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_metrics(Path("a"))
    checkpoint(Path("lightning_logs/digits/teacher/version_0"))
    run = "lightning_logs/digits/teacher/version_0"
    with pytest.raises(FileNotFoundError, match=f"'{run}' is not tested yet; run `kd-lightning test -c {run}/config"):
        compare(["a", "digits/teacher"], output="t.md")
    assert not Path("t.md").exists()
    with pytest.raises(FileNotFoundError, match="'lightning_logs/digits/teacher/version_0' is not tested yet"):
        compare([run])


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"parameters": "x"}'])
def test_compare_names_damaged_metrics(tmp_path: Path, text: str) -> None:
    run_with_metrics(tmp_path / "a")
    (tmp_path / "a" / "test.json").write_text(text)
    with pytest.raises(ValueError, match=r"is damaged; run `kd-lightning test -c .*config\.yaml` to write it again"):
        compare([str(tmp_path / "a")])


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from kd_lightning import Run; Run('x').checkpoints\n"
        "print([m for m in ('torch', 'lightning', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
