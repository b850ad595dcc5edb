"""Completion in a shell, which ends at once, and the beginning of `fit --help`."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest
import yaml

from kd_lightning.cli.completion import candidates
from kd_lightning.cli.fit_help import OPTIONS, fit_help
from kd_lightning.cli.main import COMMANDS
from kd_lightning.recipes import recipe_names

Command = Callable[..., str]

RUN = Path("lightning_logs/digits/teacher/version_0")


@pytest.fixture
def trained(kd: Command) -> None:
    (RUN / "checkpoints").mkdir(parents=True)
    Path("mine.yaml").touch()
    Path("my_images/ants").mkdir(parents=True)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], sorted(COMMANDS)),
        (["fit", "-c", "digits/te"], ["digits/teacher"]),
        (["fit", "-c", "lightning_logs/digits/t"], ["lightning_logs/digits/teacher/", str(RUN)]),
        (["fit", "-c", "mi"], ["mine.yaml"]),
        (["fit", "--data.root", "my_im"], ["my_images/"]),
        (["fit", "--data.root", "my_images/"], ["my_images/ants/"]),
        (["fit", "--trainer.precision=bf"], ["bf16-mixed"]),
        (["fit", "--trainer.precision", ""], ["16-mixed", "32-true", "bf16-mixed"]),
        (["fit", "--ckpt_path", "la"], ["last"]),
        (["test", "--ckpt"], ["--ckpt_path"]),
        (["export", "--i"], ["--int8"]),
        (["export", "digits/"], ["digits/teacher"]),
        (["compress", "--num"], ["--num_classes"]),
        (["runs", "--delete", "dig"], ["digits/teacher/version_0"]),
        (["nothing", "--"], ["--help"]),
    ],
    ids=" ".join,
)
def test_words_are_completed(words: list[str], expected: list[str]) -> None:
    assert candidates(words) == expected


def test_all_recipes_are_offered(kd: Command) -> None:
    assert candidates(["fit", "-c", ""]) == sorted(recipe_names())


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["kd-lightning", "doc"], ["doctor"]),
        (["kd-lightning", "fit", "-c", "digits/dis"], ["digits/dist", "digits/dist_plus", "digits/distill"]),
        (["kd-lightning", "fit", "--trainer.accelerator", "=", "g"], ["gpu"]),  # as bash divides words
        (["kd-lightning", "fit", "--trainer.accelerator", "="], ["auto", "cpu", "gpu"]),
        (["kd-lightning", "fit", "--data.root", "my_"], ["my_images/"]),
    ],
)
def test_bash_completes_and_ends(line: list[str], expected: list[str]) -> None:
    script = f"""
        kd-lightning() {{ {shlex.quote(sys.executable)} -m kd_lightning "$@"; }}
        eval "$(kd-lightning completion)"
        COMP_WORDS=({shlex.join(line)}); COMP_CWORD={len(line) - 1}
        _kd_lightning
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    start = perf_counter()
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == expected
    assert perf_counter() - start < 20, "it starts without torch"


# --- the head of the help


def test_it_begins_with_twenty_options(kd: Command) -> None:
    listed = [option.flag for options in OPTIONS.values() for option in options]
    assert len(listed) == len(set(listed)) == 20
    printed = kd("fit", "-c", "digits/teacher", "--help")
    assert printed.strip() == fit_help()
    assert all(flag in printed for flag in listed)
    assert "kd-lightning fit --help-all" in printed


def test_each_of_them_is_an_option(kd: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    values = {
        "-c": "digits/distill",
        "--teacher": "teacher.pt",
        "--ckpt_path": None,  # would be opened
        "--data.root": str(tmp_path),
        "--data.augmentation.preset": "light",
        "--model.student": "kd_lightning.networks.resnet20",
        "--model.optimizer": "AdamW",
        "--trainer.precision": "bf16-mixed",
        "--trainer.accelerator": "cpu",
        "--model.teacher_cache": "true",
        "--model.temperature": "2.0",
        "--model.alpha": "0.5",
        "--model.learning_rate": "0.125",
    }
    words = ["fit", "-c", "digits/distill", "--data=ImageFolderDataModule"]
    for option in (option for options in OPTIONS.values() for option in options):
        value = values.get(option.flag, "2")
        if option.value and value is not None and option.flag != "-c":
            words += [option.flag, value]
    with pytest.raises(SystemExit) as ended:
        kd(*words, "--print_config")
    assert not ended.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["teacher"]["init_args"]["path"] == "teacher.pt"
    assert config["model"]["init_args"]["learning_rate"] == 0.125
    assert config["data"]["init_args"]["augmentation"]["preset"] == "light"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m kd_lightning recipes | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert done.stdout.split()[-1] in ("0", "141")
