"""`kd-lightning compress`: a chain of commands that goes on where it was stopped."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kd_lightning.compress import read_stages
from kd_lightning.recipes import stages_of

QUICK = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.teacher_check=off",
]


def compress(where: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kd_lightning", "compress", *arguments]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("recipes", ["digits", "cifar10", "cifar100", "folder"])
def test_a_packaged_chain_can_be_read_before_it_runs(recipes: str, kd: Callable[..., str]) -> None:
    printed = kd("compress", "-c", recipes, "--print", "--data.batch_size=7")
    names = re.findall(r"== \d+/\d+ ([\w.-]+): kd-lightning fit .*--data.batch_size=7", printed)
    assert names == ["teacher", "student", "distilled", "pruned"]
    assert f"fit -c {recipes}/distill --teacher lightning_logs/compress/{recipes}/teacher " in printed
    assert f"test -c lightning_logs/compress/{recipes}/pruned/config.yaml" in printed
    assert not Path("lightning_logs").exists()


def test_every_stage_is_a_command_that_can_be_run_by_hand(tmp_path: Path) -> None:
    for line in compress(tmp_path, "-c", "digits", "--print").stdout.splitlines():
        words = shlex.split(line.partition(": ")[2])
        assert words[0] == "kd-lightning"
        assert words[1] in ("fit", "test", "export", "report")


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("- fit", "must hold lines of the form `stage: command`"),
        ("a: [fit]", "must hold lines of the form"),
        ("a: 'fit", "is no YAML file"),
        ("a: rm -r x", "must begin with fit, export or report"),
        ("a: ''", "must begin with fit, export or report"),
        ("a: export {b}", "names {b}, which is no stage before it"),
        ("a: export {a}", "names {a}, which is no stage before it"),
        ("a: fit -c {recipes}/teacher", "names {recipes}, which is no stage before it"),
        ("../a: fit -c digits/teacher", "The name of a stage becomes that of a folder or a file"),
    ],
)
def test_a_chain_that_cannot_work_is_refused(chain: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(chain)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_stages(tmp_path / "chain.yaml")


def test_an_unknown_chain_is_refused(kd: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="'transfer' is neither a YAML file of stages nor a folder of recipes with"):
        kd("compress", "-c", "transfer")


def test_all_stages_of_a_packaged_chain_name_what_is_there() -> None:
    for recipes in ("digits", "cifar10"):
        stages = read_stages(*stages_of(recipes))
        assert stages[-1].name == "report"
        assert set(stages[-1].needs) == {s.name for s in stages if s.name.endswith(".onnx")}


def test_what_is_there_stays_and_what_was_made_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student\nstudent.onnx: export {student}\n")
    chain = ["-c", "chain.yaml", "-o", "out", *QUICK[:-1]]
    first = compress(tmp_path, *chain)
    assert "All 2 stages are done; what they made is in out." in first.stdout, first.stderr
    assert yaml.safe_load((tmp_path / "out/student/config.yaml").read_text())["trainer"]["limit_train_batches"] == 2
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*") if file.is_file()}

    again = compress(tmp_path, *chain)
    assert "It is there: out/student.onnx" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*") if file.is_file()} == made

    other = compress(tmp_path, *chain, "--seed_everything=1")
    assert other.returncode == 1
    assert "'out/student' was made from something else (different: the options)" in other.stderr

    (tmp_path / "out/student/checkpoints/best.ckpt").write_bytes(b"another network")
    stale = compress(tmp_path, *chain)
    assert "'out/student.onnx' was made from something else (different: student)" in stale.stderr

    (tmp_path / "out/student.onnx").unlink()
    assert (
        "cannot be read as a checkpoint" in compress(tmp_path, *chain).stderr
    )  # it runs again, and says what it finds


def test_what_the_chain_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out/teacher").mkdir(parents=True)
    refused = compress(tmp_path, "-c", "digits", "-o", "out", *QUICK)
    assert "'out/teacher' is there and was not made by this chain" in refused.stderr
    assert not any((tmp_path / "out/teacher").iterdir())


def test_a_chain_that_is_stopped_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student\n")
    chain = ["-c", "chain.yaml", "-o", "out", *QUICK[1:-1], "--trainer.max_epochs=40"]
    command = [sys.executable, "-m", "kd_lightning", "compress", *chain]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        last = tmp_path / "out/student/checkpoints/last.ckpt"
        for _ in range(600):
            if last.exists():
                break
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        printed = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stage 'student' was not finished; the same command goes on from there" in printed
    assert not (tmp_path / "out/student/test.json").exists()

    on = compress(tmp_path, *chain)
    assert on.stdout.count("The checkpoint is out/student/checkpoints/") == 2, "one to go on from, one to test"
    assert "All 1 stages are done" in on.stdout
    assert (tmp_path / "out/student/test.json").is_file()


@pytest.mark.slow
def test_the_whole_chain_of_the_digits(tmp_path: Path) -> None:
    done = compress(tmp_path, "-c", "digits", "-o", "out", *[q for q in QUICK if "teacher_check" not in q])
    assert "All 10 stages are done" in done.stdout, done.stderr
    page = (tmp_path / "out/report/report.md").read_text()
    for name in ("teacher", "student", "distilled", "pruned", "pruned-int8"):
        assert f"| {name}.onnx |" in page
