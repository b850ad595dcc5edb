"""The command line as a user types it."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_options import QUICK, QUIET
from torch import nn

from kd_lightning.networks import ResNet, data_config, from_checkpoint

Command = Callable[..., str]

TEACHER_RUN = Path("lightning_logs/digits/teacher/version_0")
STUDENT_RUN = Path("lightning_logs/digits/distill/version_0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a teacher was trained and a student distilled."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from kd_lightning.__main__ import main

        for recipe in ("digits/teacher", "digits/distill"):
            patch.setattr("sys.argv", ["kd-lightning", "fit", "-c", recipe, *QUICK])
            main()
    return folder


def _message(kd: Command, *arguments: str) -> str:
    """The one sentence with which a command is refused."""
    with pytest.raises(SystemExit) as refusal:
        kd(*arguments)
    message = str(refusal.value.code)
    assert "\n" not in message
    return message


# --- fit


def test_fit_names_the_best_checkpoint_and_saves_plain_data(here: Path) -> None:
    for run in (TEACHER_RUN, STUDENT_RUN):
        assert (run / "config.yaml").is_file()
        for which in ("best", "last"):
            torch.load(run / "checkpoints" / f"{which}.ckpt", weights_only=True)
    student = torch.load(STUDENT_RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("network.") for key in student)


def test_fit_ends_with_the_best_checkpoint(kd: Command) -> None:
    printed = kd("fit", "-c", "digits/student", *QUICK)
    cost, line, following = printed.strip().splitlines()[-3:]
    assert re.match(r"The training took \d+ s: \d+% waiting for images, \d+% the network, \d+% validation and th", cost)
    assert following == "Next: kd-lightning test -c lightning_logs/digits/student/version_0"
    assert line.startswith("The best checkpoint is lightning_logs/digits/student/version_0/checkpoints/best.ckpt")
    assert "val/accuracy 0." in line


def test_a_second_fit_gets_a_folder_of_its_own(kd: Command, here: Path) -> None:
    before = (TEACHER_RUN / "checkpoints/best.ckpt").read_bytes()
    kd("fit", "-c", "digits/teacher", *QUICK)
    assert (TEACHER_RUN.with_name("version_1") / "checkpoints/best.ckpt").is_file()
    assert (TEACHER_RUN / "checkpoints/best.ckpt").read_bytes() == before


def test_fit_goes_on_from_last_in_the_same_folder(kd: Command, here: Path) -> None:
    config = (TEACHER_RUN / "config.yaml").read_text()
    kd("fit", "-c", "digits/teacher", "--ckpt_path", "last", *QUICK, "--trainer.max_epochs=3")
    assert [run.name for run in TEACHER_RUN.parent.iterdir()] == ["version_0"]
    assert torch.load(TEACHER_RUN / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2
    assert (TEACHER_RUN / "config.yaml").read_text() == config


def test_a_run_of_a_name_of_its_own_goes_on_and_no_other(kd: Command, here: Path) -> None:
    named = ["--trainer.logger.version=mine", "--ckpt_path=auto"]
    newest = (TEACHER_RUN / "checkpoints/last.ckpt").read_bytes()
    assert "so the run starts from the beginning" in kd("fit", "-c", "digits/teacher", *named, *QUICK)
    run = TEACHER_RUN.with_name("mine")
    first = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"]
    printed = kd("fit", "-c", "digits/teacher", *named, *QUICK, f"--trainer.max_epochs={first + 2}")
    assert f"The checkpoint is {run}" in printed
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == first + 1
    assert (TEACHER_RUN / "checkpoints/last.ckpt").read_bytes() == newest


def test_a_user_s_own_config_and_network(kd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Sequential):\n"
        "    def __init__(self, width: int = 8):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "model:\n"
        "  class_path: kd_lightning.TeacherModule\n"
        "  init_args:\n"
        "    network: {class_path: my_networks.Mine, init_args: {width: 16}}\n"
        "    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}\n"
        "    lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1}}\n"
        "data: {class_path: kd_lightning.DigitsDataModule}\n"
    )
    kd("fit", "-c", "mine.yaml", *QUICK)
    assert "test/accuracy" in kd("test", "-c", "lightning_logs/version_0/config.yaml", *QUIET)


@pytest.mark.parametrize("name", ["torchvision.models.resnet18", "timm.create_model"])
def test_networks_of_other_packages(kd: Command, name: str) -> None:
    pytest.importorskip(name.partition(".")[0])
    options = (
        ["--model.network.model_name=resnet10t", "--model.network.dict_kwargs.in_chans=1"] if "timm" in name else []
    )
    assert name in _print_config(kd, name, options)


def _print_config(kd: Command, name: str, options: list[str]) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        kd("fit", "-c", "digits/teacher", f"--model.network={name}", *options, "--print_config")
    assert ended.value.code in (0, None)
    return out.getvalue()


# --- test, validate, predict


def test_test_finds_the_best_checkpoint_and_writes_beside_it(kd: Command, here: Path) -> None:
    printed = kd("test", "-c", "digits/distill", *QUIET)
    assert f"The checkpoint is {STUDENT_RUN}/checkpoints/best.ckpt." in printed
    figures = json.loads((STUDENT_RUN / "test.json").read_text())
    assert {"accuracy", "agreement", "kl", "ece", "loss", "top5"} <= set(figures)
    assert [run.name for run in STUDENT_RUN.parent.iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        (["test", "-c", "digits/distill"], ["best"]),
        (["predict", "-c", "digits/distill", "--ckpt_path=last"], ["last"]),
        (["fit", "-c", "digits/distill", "--ckpt_path=auto", "--trainer.max_epochs=3"], ["best", "last"]),
    ],
)
def test_a_command_reads_each_checkpoint_once(
    kd: Command, here: Path, loaded_files: list[Path], arguments: list[str], own: list[str]
) -> None:
    kd(*arguments, *QUIET)
    checkpoints = [STUDENT_RUN / "checkpoints" / f"{name}.ckpt" for name in own]
    assert sorted(loaded_files) == sorted([*checkpoints, TEACHER_RUN / "checkpoints/best.ckpt"])


def test_test_remembers_the_flags_of_fit(kd: Command) -> None:
    kd("fit", "-c", "digits/student", "--model.network.widths=[3,5,7]", *QUICK)
    assert "test/accuracy" in kd("test", "-c", "digits/student", *QUIET)


def test_best_and_last_belong_to_the_config_that_is_given(kd: Command, here: Path) -> None:
    shutil.copytree(STUDENT_RUN, STUDENT_RUN.with_name("version_7"))
    old = kd("validate", "-c", str(STUDENT_RUN / "config.yaml"), "--ckpt_path", "last", *QUIET)
    assert f"The checkpoint is {STUDENT_RUN}/checkpoints/last.ckpt." in old
    new = kd("validate", "-c", "digits/distill", "--ckpt_path", "last", *QUIET)
    assert "version_7/checkpoints/last.ckpt." in new


def test_a_checkpoint_alone_brings_its_config(kd: Command, here: Path) -> None:
    printed = kd("test", "--ckpt_path", str(STUDENT_RUN / "checkpoints/best.ckpt"), *QUIET)
    assert f"The configuration is the one in {STUDENT_RUN}/checkpoints/best.ckpt" in printed
    assert "test/accuracy" in printed


def test_a_student_is_tested_and_teaches_where_its_teacher_is_absent(kd: Command, here: Path) -> None:
    with_teacher = kd("test", "-c", "digits/distill", *QUIET)
    shutil.move(STUDENT_RUN / "checkpoints/best.ckpt", "student.ckpt")
    shutil.move(STUDENT_RUN / "config.yaml", "student.yaml")
    shutil.rmtree("lightning_logs")
    printed = kd("test", "-c", "student.yaml", "--ckpt_path", "student.ckpt", *QUIET)
    assert "agreement with the teacher is left out" in printed
    assert _figure(printed) == _figure(with_teacher)
    shape = ["network=kd_lightning.networks.ResNet", "network.blocks=[1,1,1]", "network.widths=[2,4,8]"]
    options = [f"--model.teacher.{option}" for option in [*shape, "network.in_channels=1"]]
    kd("fit", "-c", "digits/distill", "--teacher", "student.ckpt", "--model.teacher_check=off", *options, *QUICK)


def _figure(printed: str) -> float:
    line = next(line for line in printed.splitlines() if "test/accuracy" in line)
    return float(line.replace("│", " ").split()[1])


def test_flags_override_what_the_checkpoint_says(kd: Command, here: Path) -> None:
    """Lightning would take alpha from the checkpoint's hyper-parameters."""
    kd("fit", "-c", "digits/distill", "--ckpt_path", "last", "--model.alpha=0.25", *QUICK, "--trainer.max_epochs=3")
    saved = torch.load(STUDENT_RUN / "checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["alpha"] == 0.25


def test_load_from_checkpoint_works_after_a_run_of_the_command_line(here: Path) -> None:
    from kd_lightning import DistillationModule, TeacherModule

    teacher = TeacherModule.load_from_checkpoint(TEACHER_RUN / "checkpoints/best.ckpt")
    module = DistillationModule.load_from_checkpoint(STUDENT_RUN / "checkpoints/best.ckpt")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(module.teacher(images), teacher.eval().network(images))
    alone = DistillationModule.load_from_checkpoint(STUDENT_RUN / "checkpoints/best.ckpt", teacher=None)
    assert alone.teacher is None
    torch.testing.assert_close(alone.eval()(images), module.eval()(images))


def test_predict_writes_a_table(kd: Command, here: Path) -> None:
    printed = kd("predict", "-c", "digits/distill", *QUIET)
    path = STUDENT_RUN / "predictions.csv"
    assert f"The predictions are in {path}." in printed
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360
    assert list(rows[0]) == ["image", "label", "probability"]
    assert all(0 < float(row["probability"]) <= 1 and row["label"] in "0123456789" for row in rows)
    message = _message(kd, "predict", "-c", "digits/distill", f"--predictions.path={path}", *QUIET)
    assert "exists; name another file" in message


def test_compare_prints_tested_runs(kd: Command, here: Path) -> None:
    for recipe in ("digits/teacher", "digits/distill"):
        kd("test", "-c", recipe, *QUIET)
    printed = kd("compare", "digits/teacher", "digits/distill", "--output", "table.md")
    assert "174,970" in printed
    assert "| digits/distill | 1,384 |" in Path("table.md").read_text()


def test_a_published_network_is_tested_without_a_checkpoint(kd: Command, tmp_path: Path) -> None:
    network = ResNet([1, 1], [4, 8], in_channels=1)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "published.pt")
    shape = ["blocks=[1,1]", "widths=[4,8]", "in_channels=1"]
    options = [
        "--model.network=kd_lightning.networks.from_checkpoint",
        "--model.network.path=published.pt",
        "--model.network.network=kd_lightning.networks.ResNet",
        *[f"--model.network.network.{option}" for option in shape],
    ]
    printed = kd("test", "-c", "digits/student", *QUIET, *options)
    assert "test/accuracy" in printed
    assert "The weights are those that the network is built with" in printed


@pytest.mark.parametrize("command", ["test", "validate"])
def test_a_published_network_that_was_trained_on_is_tested_as_it_became(kd: Command, here: Path, command: str) -> None:
    (here / "tuned.yaml").write_text(
        f"""
model:
  class_path: kd_lightning.TeacherModule
  init_args:
    network:
      class_path: kd_lightning.networks.from_checkpoint
      init_args:
        network: {{class_path: kd_lightning.networks.ResNet,
          init_args: {{blocks: [2, 2, 2], widths: [16, 32, 64], in_channels: 1}}}}
        path: {TEACHER_RUN / "checkpoints/last.ckpt"}
data: kd_lightning.DigitsDataModule
"""
    )
    log = "--trainer.logger.init_args"
    kd("fit", "-c", "tuned.yaml", f"{log}.name=", f"{log}.version=tuned", *QUICK)
    config = Path("lightning_logs/tuned/config.yaml")
    before = config.read_text()
    printed = kd(command, "-c", str(config), *QUIET)
    assert "The checkpoint is lightning_logs/tuned/checkpoints/best.ckpt" in printed
    assert config.read_text() == before, "still the configuration of a training"


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "-c", "digits/nothing"], "'digits/nothing' is neither a file nor a recipe; near ones are"),
        (["fit", "-c", "digits/distill"], "The recipe 'digits/teacher' is not trained yet; run `kd-lightning fit"),
        (
            ["fit", "-c", "digits/distill", "--teacher", "absent.ckpt"],
            "There is no checkpoint, run or trained recipe 'absent.ckpt'",
        ),
        (["fit", "-c", "digits/teacher", "--ckpt_path", "last"], "does not contain a run with checkpoints"),
        (["fit", "-c", "digits/teacher", "--ckpt_path", "x.ckpt"], "There is no checkpoint 'x.ckpt'"),
        (["test", "-c", "digits/teacher"], "does not contain a run with checkpoints"),
        (["test", "-c", "digits/teacher", "--ckpt_path", "best"], "does not contain a run with checkpoints"),
        (["test"], "No model is named; add -c"),
        (["test", "--ckpt_path", "best"], "No model is named; add -c"),
        (["fit"], "No model is named; add -c"),
        (["test", "--ckpt_path", "x.ckpt"], "There is no checkpoint 'x.ckpt'"),
        (["compare", "digits/teacher"], "The recipe 'digits/teacher' is not trained yet"),
        (["fit", "-c", "photos/teacher", "--data.root=nowhere"], "There is no folder 'nowhere"),
        (["fit", "-c", "digits/student", "--model.label_smoothing=2"], "label_smoothing must be in [0, 1]"),
        (["fit", "-c", "digits/student", "--data.batch_size=0"], "batch_size must be >= 1, got 0"),
        (["fit", "-c", "digits/student", "--model.network.num_classes=7"], "has 7 classes but the data have 10"),
    ],
)
def test_refusals_are_one_sentence(kd: Command, arguments: list[str], message: str) -> None:
    options = [] if arguments[0] == "compare" else QUIET
    assert message in _message(kd, *arguments, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accelerator=no"], "The configuration cannot be built: You selected an invalid accelerator name"),
        (
            ["--model.network=torch.nn.Linear", "--model.network.in_features=8", "--model.network.out_features=-1"],
            "neg",
        ),
        (["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=0.5"], "`val_check_interval` should"),
        (["--trainer.val_check_interval=99"], "`val_check_interval` (99) must be less than or equal to the number"),
    ],
)
def test_what_other_packages_refuse_is_one_sentence_too(kd: Command, options: list[str], message: str) -> None:
    said = _message(kd, "fit", "-c", "digits/student", *QUIET, *options)
    assert message in said
    assert said.startswith("kd-lightning fit: ")


def test_a_traceback_can_be_had(kd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="cannot be built") as error:
        kd("fit", "-c", "digits/student", *QUIET, "--trainer.accelerator=no")
    assert error.value.__cause__ is not None


def test_checkpoints_can_be_turned_off(kd: Command, tmp_path: Path) -> None:
    kd("fit", "-c", "digits/student", *QUICK, "--trainer.enable_checkpointing=false", "--trainer.max_epochs=1")
    assert not list(tmp_path.rglob("*.ckpt"))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("ran", "w")


@pytest.mark.parametrize("kind", ["foreign", "truncated", "flipped", "code", "other"])
def test_bad_teachers_are_one_sentence(kd: Command, here: Path, kind: str) -> None:
    path = TEACHER_RUN / "checkpoints/best.ckpt"
    content = path.read_bytes()
    if kind == "foreign":
        path.write_text("no checkpoint")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "code":
        torch.save({"state_dict": Bomb()}, path)
    else:
        torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, path)
    for command in ("fit", "test"):
        message = _message(kd, command, "-c", "digits/distill", *QUIET)
        assert str(path) in message
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", ["truncated", "code"])
def test_bad_checkpoints_are_one_sentence(kd: Command, here: Path, kind: str) -> None:
    path = TEACHER_RUN / "checkpoints/best.ckpt"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        torch.save({"state_dict": {}, "x": Bomb()}, path)
    for command in ("test", "validate", "predict", "fit"):
        message = _message(kd, command, "-c", "digits/teacher", "--ckpt_path", "best", *QUIET)
        assert str(path) in message
    assert not Path("ran").exists()


def test_the_checkpoint_of_a_run_fills_a_network(here: Path) -> None:
    network = from_checkpoint(ResNet([2, 2, 2], [16, 32, 64], in_channels=1), TEACHER_RUN / "checkpoints/best.ckpt")
    assert data_config(network).classes == tuple("0123456789")


def test_help_lists_the_commands(kd: Command) -> None:
    printed = kd("--help")
    for command in ("fit", "validate", "test", "predict", "recipes", "compare"):
        assert f"  {command}" in printed
    assert kd("--version").strip()[0].isdigit()
    with pytest.raises(SystemExit, match="there is no command 'distil'"):
        kd("distil")
