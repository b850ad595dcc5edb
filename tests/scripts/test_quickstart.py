"""The quickstart runs through, its screen is calm, and its figures are what was measured."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from browser import require_browser
from PIL import Image

pytestmark = pytest.mark.usefixtures("beside_the_scripts")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def quickstart() -> ModuleType:
    return importlib.import_module("quickstart")


def run(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPTS / "quickstart.py"), *options]
    path = os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """The folder of a run of two epochs with two seeds, and what it printed."""
    place = tmp_path_factory.mktemp("quickstart")
    return place / "lightning_logs" / "quickstart", run(place, "--short", "--seeds", "2")


def test_the_screen_is_one_line_a_stage_and_what_was_gained(short: Any) -> None:
    folder, ended = short
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    lines = [line.rstrip() for line in ended.stdout.splitlines()]
    patterns = [
        r"Teacher, all 1,150 labels +━+ \d+\.\d% \d+\.\d%",
        r"Student alone, \d+ labels +━+ \d+\.\d% \d+\.\d%",
        r"Student distilled, \d+ labels +━+ \d+\.\d% \d+\.\d%",
        r"Export to ONNX, and report +━+",
        "",
        r"Accuracy  \d+\.\d% alone, \d+\.\d% distilled: [+-]\d+\.\d points \(95% interval .* to .*, 2 seeds\)",
        r"Size      \d\.\d+ MB teacher, \d\.\d+ MB student: \d+ times smaller",
        r"Latency   \d\.\d+ ms teacher, \d\.\d+ ms student: \d+\.\d times faster",
        "",
        re.escape(f"The report       {(folder / 'report' / 'index.html').as_uri()}"),
        r"The curves       \S+/tensorboard --logdir lightning_logs/quickstart",
        r"Your own images  \S+/kd-lightning compress -c photos .*",
    ]
    assert len(lines) == len(patterns), ended.stdout
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert max(map(len, lines[:8])) <= 100


def test_there_are_no_warnings_and_no_advertisement_that_a_user_could_see(short: Any) -> None:
    folder, ended = short
    assert "Warning" not in ended.stdout
    assert "Tip" not in ended.stdout
    log = (folder / "log.txt").read_text()
    assert "lightning.ai" not in log
    assert "litlogger" not in log.lower()


def test_the_figures_are_those_of_the_tests(short: Any) -> None:
    folder, ended = short
    results = json.loads((folder / "results.json").read_text())
    for name, accuracies in results["test_accuracy"].items():
        tested = [json.loads((folder / name / f"seed_{seed}" / "test.json").read_text()) for seed in range(2)]
        assert accuracies == [metrics["accuracy"] for metrics in tested]
        assert results["bytes"][name] == (folder / f"{name}.onnx").stat().st_size
    alone, distilled = (sum(results["test_accuracy"][name]) / 2 for name in ("alone", "distilled"))
    assert f"{100 * alone:.1f}% alone, {100 * distilled:.1f}% distilled" in ended.stdout
    assert (folder / "report" / "index.html").is_file()


def test_its_commands_are_those_of_the_command_line_and_its_runs_are_runs(
    short: Any, kd: Callable[..., str], tmp_path: Path
) -> None:
    folder, _ = short
    log = (folder / "log.txt").read_text()
    commands = [line for line in log.splitlines() if line.startswith("$ kd-lightning")]
    assert [command.split()[2] for command in commands] == ["fit", "test"] * 6 + ["export"] * 3 + ["report"]
    students = [command for command in commands if "digits/distill" in command]
    assert ["labels_per_class" in command for command in students] == [True, True]
    kd("test", "-c", str(folder / "distilled" / "seed_1"), "--trainer.enable_progress_bar=false")
    assert (folder / "distilled" / "seed_1" / "test.json").is_file()


def test_teacher_alone_and_distilled_are_runs_of_one_picture_with_the_gap_closed(short: Any) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    found = EventMultiplexer().AddRunsFromDirectory(str(short[0]))
    found.Reload()
    runs = {name: tags["scalars"] for name, tags in found.Runs().items()}
    assert set(runs) == {f"{name}/seed_{seed}" for name in ("teacher", "alone", "distilled") for seed in range(2)}
    assert all("val/accuracy" in tags for tags in runs.values())
    assert all("val/gap_closed" in runs[f"distilled/seed_{seed}"] for seed in range(2))


def test_it_can_be_run_again_and_a_folder_of_results_is_not_overwritten(quickstart: ModuleType, tmp_path: Path) -> None:
    assert quickstart.free_folder(tmp_path) == tmp_path / "quickstart"
    for name in ("quickstart", "quickstart_1"):
        (tmp_path / name).mkdir()
    assert quickstart.free_folder(tmp_path) == tmp_path / "quickstart_2"
    ended = run(tmp_path, "--folder", "quickstart")
    assert ended.returncode == 2
    assert "'quickstart' exists; name another --folder." in ended.stderr


def test_an_error_is_shown_with_the_file_of_all_output(tmp_path: Path, quickstart: ModuleType) -> None:
    script = f"""
import sys, os
sys.path.insert(0, {str(SCRIPTS)!r})
import quickstart
from pathlib import Path
with quickstart.all_output_in(Path("log.txt")) as console:
    os.write(1, b"from a library\\n")
    console.print("seen")
    sys.exit("kd-lightning fit: there is no teacher.")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout == "seen\n"
    assert ended.stderr.splitlines() == [
        "from a library",
        "kd-lightning fit: there is no teacher.",
        "All output is in log.txt.",
    ]


def test_the_interval_is_students(quickstart: ModuleType) -> None:
    low, high = quickstart.interval([10.0, 12.0, 14.0])
    assert (low, high) == pytest.approx((12 - 4.302653 * 2 / 3**0.5, 12 + 4.302653 * 2 / 3**0.5), abs=1e-4)


def test_students_take_as_many_steps_and_are_validated_as_often(quickstart: ModuleType, kd: Any) -> None:
    """The student alone gets no fewer steps than the distilled one, nor fewer epochs to choose from."""
    from kd_lightning import DigitsDataModule

    def option(name: str, flag: str, default: int = 1) -> int:
        given = [word.partition("=")[2] for word in quickstart.FITS[name] if word.startswith(f"--{flag}=")]
        return int(given[-1]) if given else default

    steps, validations = {}, {}
    for name in ("alone", "distilled"):
        data = DigitsDataModule(
            labels_per_class=option(name, "data.labels_per_class"), labelled_only=name == "alone", split_seed=0
        )
        data.setup("fit")
        epochs = option(name, "trainer.max_epochs")
        steps[name] = epochs * len(data.train_dataloader())
        validations[name] = epochs // option(name, "trainer.check_val_every_n_epoch")
    assert steps["alone"] == steps["distilled"]
    assert validations["alone"] == validations["distilled"]


def test_the_next_command_is_one_that_compress_takes(
    quickstart: ModuleType, kd: Callable[..., str], tmp_path: Path
) -> None:
    for number in range(5):
        (tmp_path / "my_images" / str(number)).mkdir(parents=True)
    printed = kd(*shlex.split(quickstart.OWN_IMAGES), "--print")
    assert "fit -c photos/distill" in printed


def test_the_shell_script_installs_once_and_passes_its_options_on(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "quickstart.sh", tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$*" >> calls\ncase "$1" in -c) echo "the CPU" ;; esac\n')
    python.chmod(0o755)
    command = ["bash", str(tmp_path / "scripts" / "quickstart.sh"), "--seeds", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "Installing into .venv (a few minutes the first time, and 6 GB where PyTorch brings CUDA along)",
        "Training on the CPU",
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1].startswith("-m pip install")
    assert calls[1].endswith(".[prune,export]")
    assert calls[-1] == "scripts/quickstart.py --seeds 4"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_distillation_gains_many_times_its_spread(tmp_path: Path) -> None:
    path = os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "quickstart.py"), "--folder", "runs"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=880, env=environment)
    results = json.loads((tmp_path / "runs" / "results.json").read_text())["test_accuracy"]
    gains = [after - before for before, after in zip(results["alone"], results["distilled"], strict=True)]
    assert min(gains) > 0.05
    assert min(results["distilled"]) > max(results["alone"]) + 0.03


# --- the figures in the README


@pytest.fixture
def tables() -> ModuleType:
    return importlib.import_module("quickstart_table")


def test_the_readmes_figures_are_those_that_are_kept(tables: ModuleType) -> None:
    results = json.loads((tables.PUBLISHED / "results.json").read_text())
    readme = (SCRIPTS.parent / "README.md").read_text()
    assert tables.with_table(readme, results) == readme
    assert len(results["test_accuracy"]["alone"]) == 5
    assert (tables.PUBLISHED / "tensorboard.png").stat().st_size < 60_000


def test_the_table_has_means_spreads_and_the_interval_of_the_gain(tables: ModuleType) -> None:
    results = {
        "test_accuracy": {"teacher": [0.98, 1.0], "alone": [0.7, 0.8], "distilled": [0.9, 0.96]},
        "bytes": {"teacher": 2_000_000, "alone": 20_000, "distilled": 20_000},
        "latency_ms": {"teacher": 0.25, "alone": 0.05, "distilled": 0.05},
    }
    lines = tables.table(results).splitlines()
    assert lines[2] == "| the teacher | 99.0 ± 1.4 | 98.0 to 100.0 | 2.000 | 0.250 |"
    assert lines[3] == "| the student alone | 75.0 ± 7.1 | 70.0 to 80.0 | 0.020 | 0.050 |"
    assert lines[-1].startswith("Distillation gains 18.0 points (95% interval -7.4 to 43.4, Student's t over 2 seeds")


def test_the_picture_is_one_of_tensorboard_with_the_runs_of_a_quickstart(short: Any, tmp_path: Path) -> None:
    require_browser()
    pictures = importlib.import_module("tensorboard_picture")
    command = [
        sys.executable,
        str(SCRIPTS / "tensorboard_picture.py"),
        str(short[0]),
        "--output",
        str(tmp_path / "a.png"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    assert (tmp_path / "a.png").stat().st_size < 60_000
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 800
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    orange = np.abs(pixels - [245, 124, 0]).max(1) < 30
    assert 0.03 < orange.mean() < 0.2, "TensorBoard's bar"
    assert set(pictures.NAMES) == set(importlib.import_module("quickstart").FITS)


def test_the_student_alone_has_the_best_settings_on_validation_images(tables: ModuleType) -> None:
    quickstart, choice = importlib.import_module("quickstart"), importlib.import_module("quickstart_choice")
    rows = json.loads((tables.PUBLISHED / "choice.json").read_text())
    assert [(row["learning_rate"], row["weight_decay"], row["steps"]) for row in rows] == choice.SETTINGS
    assert [len(row["val_accuracy"]) for row in rows].count(2) == len(rows) - 2
    given = dict(word.removeprefix("--").split("=") for word in quickstart.FITS["alone"] if "=" in word)
    assert int(given["trainer.max_epochs"]) == choice.SETTINGS[0][2]
    assert choice.best(rows) == 0, "the recipe's own settings"
    assert not any("model." in word for words in quickstart.FITS.values() for word in words)


def test_the_table_of_the_choice_has_a_line_for_each_setting() -> None:
    choice = importlib.import_module("quickstart_choice")
    rows = [{"learning_rate": 0.1, "weight_decay": 5e-4, "steps": 1020, "val_accuracy": [0.7, 0.8]}]
    assert choice.table(rows).splitlines()[2:] == ["| 0.1 | 0.0005 | 1020 | 70.0, 80.0 | 75.0 |"]


def test_the_best_setting_is_among_those_with_the_most_seeds() -> None:
    choice = importlib.import_module("quickstart_choice")
    assert choice.best([{"val_accuracy": values} for values in ([0.7, 0.8], [0.8, 0.8], [0.8, 0.8])]) == 1
    assert choice.best([{"val_accuracy": values} for values in ([0.7, 0.8, 0.7], [0.9, 0.9], [0.8, 0.6, 0.7])]) == 0


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
def test_a_choice_reads_the_best_epoch_on_validation_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = importlib.import_module("quickstart_choice")
    monkeypatch.setattr("sys.argv", [])
    found = choice.accuracy(tmp_path, 0.1, 5e-4, 17, seed=3)
    assert 0 < found < 1
    assert not list(tmp_path.rglob("test.json"))
