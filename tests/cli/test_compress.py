"""`kd-lightning compress`: a chain of commands that resumes where it was interrupted."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import yaml
from PIL import Image

from kd_lightning.cli.compress import compress as compress_here
from kd_lightning.cli.stages import read_stages
from kd_lightning.recipes import compress_stages
from kd_lightning.report.model import onnx_size

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


def wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"{file} did not come")


def child_of(process: int) -> int:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.parametrize("recipes", ["digits", "cifar10", "cifar100", "photos"])
def test_a_packaged_chain_can_be_read_before_it_runs(recipes: str, kd: Callable[..., str]) -> None:
    printed = kd("compress", "-c", recipes, "--print", "--data.batch_size=7")
    names = re.findall(r"== \d+/\d+ ([\w.-]+): kd-lightning fit .*--data.batch_size=7", printed)
    assert names == ["teacher", "student", "distilled", "pruned"]
    teacher = "photos/finetune" if recipes == "photos" else f"{recipes}/teacher"
    assert f"fit -c {teacher} " in printed
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
        ("a: 'fit", "is not a YAML file"),
        ("a: rm -r x", "must begin with fit, export or report"),
        ("a: ''", "must begin with fit, export or report"),
        ("a: export {b}", "names {b}, which is not a stage before it"),
        ("a: export {a}", "names {a}, which is not a stage before it"),
        ("a: fit -c {recipes}/teacher", "names {recipes}, which is not a stage before it"),
        ("../a: fit -c digits/teacher", "The name of a stage becomes that of a folder or a file"),
        ("..: fit -c digits/teacher", "The name of a stage becomes that of a folder or a file"),
        ("{}", "must hold lines of the form"),
        ("a: fit -c b\na: fit -c c", "names a stage twice"),
        ("a: fit -c 'b", "The stage 'a' cannot be split into words (No closing quotation)"),
        ("a: fit --model.network.num_classes {num_classes}", "needs the number of classes; add --num_classes"),
    ],
)
def test_an_invalid_chain_is_an_error(chain: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(chain)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_stages(tmp_path / "chain.yaml")


def test_every_stage_gets_the_options_that_it_takes(kd: Callable[..., str]) -> None:
    options = [
        "--model.temperature",
        "3",
        "--data.batch_size=7",
        "--model.optimizer=AdamW",
        "--model.optimizer.eps=1",
    ]
    printed = kd("compress", "-c", "digits", "--print", *options, "--uint8")
    stages = dict(re.findall(r"== \d+/\d+ ([\w.-]+): kd-lightning ((?:fit|export|report) .*)", printed))
    takers = {option: {name for name, words in stages.items() if option in words} for option in (*options, "--uint8")}
    fits = {"teacher", "student", "distilled", "pruned"}
    assert takers["--model.temperature"] == {"distilled", "pruned"}
    assert takers["--data.batch_size=7"] == takers["--model.optimizer.eps=1"] == fits
    assert takers["--uint8"] == {name for name in stages if name.endswith(".onnx")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.temprature=3"],
            "No stage takes --model.temprature=3: .*; the nearest is temperature",
        ),
        (["--trainer.max_epochs", "three"], "No stage takes --trainer.max_epochs three: .* must be int or null"),
        (["--int9"], "No stage takes --int9: There is no option --int9; the nearest is --int8"),
        (["-c", "more.yaml"], "compress takes one -c"),
    ],
)
def test_an_option_that_no_stage_takes_is_an_error(options: list[str], message: str, kd: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match=message):
        kd("compress", "-c", "digits", *options)
    assert not Path("lightning_logs").exists()


def test_an_unknown_chain_is_an_error(kd: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="'domains' is neither a YAML file of stages nor a folder of recipes with"):
        kd("compress", "-c", "domains")


@pytest.mark.parametrize("name", ["folder", "transfer"])
def test_former_chains_name_the_one_in_their_place(name: str, kd: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match=rf"^kd-lightning compress: The recipes of {name}/ are those of photos/ now.*: "
                                         r"type -c photos\.$"):  # fmt: skip
        kd("compress", "-c", name)


@pytest.mark.parametrize("recipes", ["digits", "photos"])
def test_networks_of_the_chain_are_named_once(recipes: str, kd: Callable[..., str]) -> None:
    names = ["--model.teacher=timm/resnet10t", "--model.student", "torchvision/resnet18"]
    printed = kd("compress", "-c", recipes, "--print", *names, "--data.batch_size=7")
    stages = dict(re.findall(r"== \d+/\d+ ([\w.-]+): kd-lightning fit (.*)", printed))
    assert {stage: re.findall(r"--model\.\S*", words) for stage, words in stages.items()} == {
        "teacher": ["--model.network=timm/resnet10t"],
        "student": ["--model.network=torchvision/resnet18"],
        "distilled": ["--model.student=torchvision/resnet18"],
        "pruned": [],
    }


def test_so_they_are_in_a_chain_of_your_own_that_has_places_for_them(kd: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("a: fit -c digits/teacher {teacher_network}\nb: fit -c digits/distill")
    printed = kd(
        "compress", "-c", "own.yaml", "--print", "--model.teacher=timm/resnet10t", "--model.student=timm/resnet18"
    )
    assert "a: kd-lightning fit -c digits/teacher --model.network=timm/resnet10t --trainer" in printed
    assert "b: kd-lightning fit -c digits/distill --model.student=timm/resnet18" in printed


def test_the_stages_of_a_packaged_chain_name_earlier_ones() -> None:
    for recipes in ("digits", "cifar10", "photos"):
        file, values = compress_stages(recipes)
        assert values["folder"] == recipes
        stages = read_stages(file, values)
        assert stages[-1].name == "report"
        assert set(stages[-1].needs) == {s.name for s in stages if s.name.endswith(".onnx")}


def test_results_stay_and_those_of_other_inputs_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student\nstudent.onnx: export {student}\n")
    chain = ["-c", "chain.yaml", "-o", "out", *QUICK[:-1]]
    first = compress(tmp_path, *chain)
    assert "All 2 stages are done; their results are in out." in first.stdout, first.stderr
    assert yaml.safe_load((tmp_path / "out/student/config.yaml").read_text())["trainer"]["limit_train_batches"] == 2
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*") if file.is_file()}

    again = compress(tmp_path, *chain)
    assert "It exists: out/student.onnx" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*") if file.is_file()} == made

    other = compress(tmp_path, *chain, "--seed_everything=1")
    assert other.returncode == 1
    assert "'out/student' was created from different inputs (changed: the options)" in other.stderr


@pytest.mark.slow
def test_results_that_were_removed_are_made_again_and_damaged_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student\nstudent.onnx: export {student}\n")
    chain = ["-c", "chain.yaml", "-o", "out", *QUICK[:-1]]
    assert compress(tmp_path, *chain).returncode == 0
    shutil.rmtree(tmp_path / "out/student")  # and made again, to the same weights
    assert "It exists: out/student.onnx" in compress(tmp_path, *chain).stdout

    best = tmp_path / "out/student/checkpoints/best.ckpt"
    best.write_bytes(b"another network")
    stale = compress(tmp_path, *chain)
    assert "'out/student.onnx' was created from different inputs (changed: student)" in stale.stderr

    (tmp_path / "out/student.onnx").unlink()
    said = compress(tmp_path, *chain).stderr  # it runs again, and says what it finds
    assert "cannot be read as a checkpoint" in said

    best.unlink()
    assert "'out/student' has lost its best checkpoint; delete it" in compress(tmp_path, *chain).stderr

    (tmp_path / "out/stages.json").write_text("{")
    assert "'out/stages.json' is damaged" in compress(tmp_path, *chain).stderr


@pytest.mark.slow
def test_a_result_of_another_recipe_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student -c my.yaml -c=~/other.yaml\n")
    recipe, other = tmp_path / "my.yaml", tmp_path / "home" / "other.yaml"
    other.parent.mkdir()
    recipe.write_text("trainer: {max_epochs: 1}\n")
    other.write_text("trainer: {log_every_n_steps: 1}\n")
    chain = ["-c=~/../chain.yaml", "-o", "out", *QUICK[1:-1]]
    assert compress(tmp_path, *chain).returncode == 0
    assert "It exists" in compress(tmp_path, chain[0], "-o", str(tmp_path / "out"), *chain[3:]).stdout
    other.write_text("trainer: {log_every_n_steps: 2}\n")
    stale = compress(tmp_path, *chain)
    assert "'out/student' was created from different inputs (changed: ~/other.yaml)" in stale.stderr
    other.write_text("trainer: {log_every_n_steps: 1}\n")
    recipe.write_text("trainer: {max_epochs: 2}\n")
    assert "'out/student' was created from different inputs (changed: my.yaml)" in compress(tmp_path, *chain).stderr


def test_a_page_is_written_again_until_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chain.yaml").write_text("report: report student.onnx\n")
    page, called = tmp_path / "out/report", []

    def call(command: list[str], lock: int) -> int:
        page.mkdir(exist_ok=True)
        (page / "report.md").touch()  # and cut before the page was written
        called.append(command)
        return 0

    monkeypatch.setattr("kd_lightning.cli.compress._call", call)
    chain = ["-c", str(tmp_path / "chain.yaml"), "-o", str(tmp_path / "out")]
    for _ in range(2):
        compress_here(chain)
    assert called == [["report", "student.onnx", "-o", str(page)]] * 2
    (page / "index.html").touch()
    compress_here(chain)
    assert len(called) == 2


@pytest.mark.slow
def test_a_training_that_outlives_the_chain_keeps_others_out(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student\n")
    chain = ["-c", "chain.yaml", "-o", "out", *QUICK[1:-1], "--trainer.max_epochs=1000"]
    command = [sys.executable, "-m", "kd_lightning", "compress", *chain]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "out/student/checkpoints/last.ckpt")
        left = child_of(process.pid)
        process.kill()
        process.wait()
        refused = compress(tmp_path, *chain)
        assert refused.returncode == 1
        assert "works in 'out'; end it, or wait until it ends" in refused.stderr
        os.kill(left, signal.SIGTERM)
    for _ in range(600):
        if "Another process" not in compress(tmp_path, "-c", "chain.yaml", "-o", "out").stderr:
            break
    else:
        pytest.fail("the lock was never let go")


def test_files_of_others_stay_unchanged(tmp_path: Path) -> None:
    (tmp_path / "out/teacher").mkdir(parents=True)
    refused = compress(tmp_path, "-c", "digits", "-o", "out", *QUICK)
    assert "'out/teacher' exists and was not created by this chain" in refused.stderr
    assert not any((tmp_path / "out/teacher").iterdir())


def test_a_stage_that_fails_is_not_called_interrupted(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student --data.batch_size=0\n")
    failed = compress(tmp_path, "-c", "chain.yaml", "-o", "out")
    assert failed.returncode == 1
    assert "batch_size must be >= 1, got 0" in failed.stderr
    last = failed.stdout.splitlines()[-1]
    assert last.endswith("stage 'student' failed, as said above; fix that, and run the same command to resume.")
    assert "interrupted" not in failed.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receiver", "number", "code"),
    [("chain", signal.SIGTERM, 143), ("chain", signal.SIGINT, 130), ("training", signal.SIGKILL, 137)],
)
def test_an_interrupted_chain_resumes_from_its_checkpoint(
    receiver: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    (tmp_path / "chain.yaml").write_text("student: fit -c digits/student\n")
    chain = ["-c", "chain.yaml", "-o", "out", *QUICK[1:-1], "--trainer.max_epochs=40"]
    command = [sys.executable, "-m", "kd_lightning", "compress", *chain]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "out/student/checkpoints/last.ckpt")
        os.kill(process.pid if receiver == "chain" else child_of(process.pid), number)
        printed = process.communicate()[0]
    assert process.returncode == code
    assert "stage 'student' was interrupted; run the same command to resume" in printed
    assert not (tmp_path / "out/student/test.json").exists()

    on = compress(tmp_path, *chain)
    assert on.stdout.count("The checkpoint is out/student/checkpoints/") == 2, "one to resume from, one to test"
    assert "All 1 stages are done" in on.stdout
    assert (tmp_path / "out/student/test.json").is_file()


@pytest.mark.slow
def test_the_whole_chain_of_the_digits(tmp_path: Path) -> None:
    options = [option for option in QUICK if "teacher_check" not in option and "max_epochs" not in option]
    done = compress(tmp_path, "-c", "digits", "-o", "out", *options, "--trainer.max_epochs=8")
    assert "All 10 stages are done" in done.stdout, done.stderr
    page = (tmp_path / "out/report/report.md").read_text()
    for name in ("teacher", "student", "distilled", "pruned", "pruned-int8"):
        assert f"| {name}.onnx |" in page
    pruned, whole = (onnx_size(tmp_path / f"out/{name}.onnx")[1] for name in ("pruned", "teacher"))
    assert pruned is not None
    assert whole is not None
    assert 0.3 < pruned / whole < 0.52, "the file is of the network after the last pruning"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chain_on_images_of_three_classes(tmp_path: Path) -> None:
    for split, label, number in product(("train", "test"), range(3), range(60)):
        folder = tmp_path / "images" / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        colour = [4 * number // 3] * 3
        colour[label] = 250
        Image.new("RGB", (16, 16), tuple(colour)).save(folder / f"{number}.png")
    data = ["--data.root=images", "--data.image_size=32", "--model.learning_rate=0.02"]
    data += ["--model.teacher=kd_lightning.networks.resnet34", "--model.student=kd_lightning.networks.resnet20"]
    file, values = compress_stages("photos")
    networks = file.read_text().partition("distilled-int8.onnx")[0]  # too few images for 8 bits
    for name in ("folder", "teacher_run"):
        networks = networks.replace(f"{{{name}}}", values[name])
    (tmp_path / "chain.yaml").write_text(networks)
    done = compress(tmp_path, "-c", "chain.yaml", "-o", "out", *data, *QUICK[2:-1], "--trainer.max_epochs=7")
    assert "All 7 stages are done" in done.stdout, done.stderr
