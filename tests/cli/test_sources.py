"""A run is a program, whose own classes are imported; a checkpoint file is data, which imports nothing of its own."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_options import QUICK, QUIET

Command = Callable[..., str]

RUN = Path("lightning_logs/digits/student/version_0")
FILE = RUN / "checkpoints/best.ckpt"
STUDENT_RUN = Path("lightning_logs/digits/distill/version_0")
PLAIN_RUN = Path("lightning_logs/plain/version_0")
OWN = """
from pathlib import Path

from torch import nn

Path(__file__).with_name("imported").touch()


class Mine(nn.Sequential):
    def __init__(self, width: int = 8):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def build(width: int = 8) -> nn.Module:
    return Mine(width)
"""
"""A user's own module, which records beside itself that it was imported."""


def forget() -> None:
    sys.modules.pop("my_nets", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a network of the user's own was trained and taught a student, and one of ours was trained."""
    folder = tmp_path_factory.mktemp("own networks")
    (folder / "my_nets.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.path", [*sys.path])
        from kd_lightning.__main__ import main

        teacher = ["--teacher", str(FILE), "--model.teacher.network=my_nets.build", "--model.teacher_check=off"]
        own = ["fit", "-c", "digits/student", "--model.network=my_nets.build", "--model.network.width=9"]
        taught = ["fit", "-c", "digits/distill", *teacher, "--model.teacher.network.width=9"]
        for arguments in (own, taught, ["fit", "-c", "digits/student", "--trainer.logger.name=plain"]):
            patch.setattr("sys.argv", ["kd-lightning", *arguments, *QUICK])
            main()
    forget()
    yield folder
    forget()


@pytest.fixture
def own(here: Path, trained: Path) -> Iterator[Callable[[], bool]]:
    """The working folder with the runs and the module; the function returns whether it was imported since."""
    shutil.copy(trained / "my_nets.py", here)
    yield lambda: Path("imported").exists()
    forget()


def refusal(kd: Command, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        kd(*arguments)
    message = str(ended.value.code)
    assert "\n" not in message
    return message


EXPORT = ["-o", "own.onnx"]
FROM_RUN = [
    ["export", str(RUN), *EXPORT],
    pytest.param(["export", "digits/student", *EXPORT], marks=pytest.mark.slow),
    ["report", str(RUN)],
    ["test", "-c", str(RUN), *QUIET],
    pytest.param(["validate", "-c", "digits/student", *QUIET], marks=pytest.mark.slow),
    ["predict", "-c", str(RUN / "config.yaml"), *QUIET],
]
FROM_FILE = [
    ["export", str(FILE), *EXPORT],
    ["report", str(FILE)],
    ["report", str(STUDENT_RUN / "checkpoints/best.ckpt"), "--teacher", str(FILE)],
    ["test", "--ckpt_path", str(FILE), *QUIET],
    pytest.param(["validate", "--ckpt_path", str(FILE), *QUIET], marks=pytest.mark.slow),
    ["predict", f"--ckpt_path={FILE}", *QUIET],
]


@pytest.mark.parametrize("arguments", FROM_RUN)
def test_a_named_run_imports_what_its_configuration_names(
    kd: Command, own: Callable[[], bool], arguments: list[str]
) -> None:
    printed = kd(*arguments)
    assert "Imported my_nets, which " in printed
    assert own()


@pytest.mark.parametrize("arguments", FROM_FILE)
def test_a_checkpoint_file_imports_nothing_unless_it_is_trusted(
    kd: Command, own: Callable[[], bool], arguments: list[str]
) -> None:
    message = refusal(kd, *arguments)
    assert "names the class 'my_nets.build', which is not part of kd_lightning" in message
    assert "name its run (test -c RUN, export RUN) or add --trust" in message
    assert not own()
    assert "Imported my_nets, which " in kd(*arguments, "--trust")
    assert own()


@pytest.mark.parametrize("command", [["export", *EXPORT], ["test", "--ckpt_path"], ["report"]])
def test_no_configuration_beside_a_file_is_read(kd: Command, here: Path, command: list[str]) -> None:
    (here / "my_nets.py").write_text(OWN)
    run = PLAIN_RUN.with_name("version_7")
    with (PLAIN_RUN / "config.yaml").open("a") as file:
        file.write("\ntrainer: {callbacks: [{class_path: my_nets.build}]}\ndata: {class_path: my_nets.build}\n")
    shutil.move(PLAIN_RUN, run)
    options = QUIET if command[0] == "test" else []
    kd(*command, str(run / "checkpoints/best.ckpt"), *options)
    assert not Path("imported").exists()
    assert "my_nets" not in sys.modules


def test_a_run_whose_checkpoint_names_more_than_its_configuration_is_refused(
    kd: Command, own: Callable[[], bool]
) -> None:
    content = torch.load(FILE, weights_only=True)
    content["hyper_parameters"]["network"] = {"class_path": "antigravity.fly"}
    torch.save(content, FILE)
    assert "names the class 'antigravity.fly'" in refusal(kd, "export", str(RUN))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("names", [["digits/distill"], ["digits/distill", "digits/student"]])
def test_a_report_of_a_run_builds_its_teacher(kd: Command, own: Callable[[], bool], names: list[str]) -> None:
    kd("report", *names)
    table = Path("report/report.md").read_text()
    assert table.index("| digits/student |") < table.index("| digits/distill |"), "the teacher comes first"


def test_a_file_of_a_student_needs_no_class_of_its_teacher_until_a_report(kd: Command, own: Callable[[], bool]) -> None:
    file = str(STUDENT_RUN / "checkpoints/best.ckpt")
    kd("export", file, "-o", "student.onnx")
    for model in (file, "student.onnx"):
        assert "names the class 'my_nets.build'" in refusal(kd, "report", model)
    assert not own()
    kd("report", "student.onnx", "--trust")


def test_of_the_file_of_a_teacher_no_class_is_imported_and_of_its_run_it_is(
    kd: Command, own: Callable[[], bool]
) -> None:
    teach = ["fit", "-c", "digits/distill", "--model.teacher_check=off", *QUICK]
    assert f"'{FILE}' does not fit ResNet" in refusal(kd, *teach, "--teacher", str(FILE))
    assert not own()
    kd(*teach, "--teacher", str(RUN))
    assert own()


def test_a_module_that_is_not_found_is_named(kd: Command, own: Callable[[], bool]) -> None:
    Path("my_nets.py").unlink()
    for arguments in (["export", str(RUN)], ["report", "digits/student"]):
        message = refusal(kd, *arguments)
        assert (
            f"'{RUN}/config.yaml' names 'my_nets.build', and there is no module 'my_nets'; install it, or run"
            in message
        )


def test_trust_without_a_checkpoint_is_refused(kd: Command) -> None:
    assert "--trust is about what a checkpoint names" in refusal(kd, "fit", "-c", "digits/student", "--trust", *QUIET)


def test_trust_is_not_saved(kd: Command, own: Callable[[], bool]) -> None:
    kd("fit", "-c", str(RUN), "--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--trust", *QUICK)
    for config in Path("lightning_logs").rglob("config.yaml"):
        assert "trust" not in config.read_text()


def test_a_file_describes_its_network_and_data(kd: Command, here: Path) -> None:
    shutil.move(PLAIN_RUN / "checkpoints/best.ckpt", "moved.ckpt")
    shutil.rmtree("lightning_logs")
    printed = kd("test", "--ckpt_path", "moved.ckpt", *QUIET)
    assert "The configuration is the one in moved.ckpt" in printed
    assert "test/accuracy" in printed
    kd("export", "moved.ckpt", "--int8")
    kd("report", "moved.ckpt")


def test_a_checkpoint_from_python_is_refused_in_one_sentence(kd: Command, here: Path) -> None:
    content = torch.load(PLAIN_RUN / "checkpoints/best.ckpt", weights_only=True)
    content["hyper_parameters"] = {"learning_rate": 0.1}
    torch.save(content, "python.ckpt")
    assert "was saved from Python, which keeps weights and no code; add -c" in refusal(
        kd, "test", "--ckpt_path", "python.ckpt"
    )
    for command in ("export", "report"):
        assert "does not describe how its network is built" in refusal(kd, command, "python.ckpt")


def test_a_checkpoint_without_its_data_asks_for_them(kd: Command, here: Path) -> None:
    content = torch.load(PLAIN_RUN / "checkpoints/best.ckpt", weights_only=True)
    del content["datamodule_hyper_parameters"]
    torch.save(content, "alone.ckpt")
    arguments = ["test", "--ckpt_path", "alone.ckpt", *QUIET]
    assert "does not describe its data; add --data, or -c" in refusal(kd, *arguments)
    assert "test/accuracy" in kd(*arguments, "--data=kd_lightning.DigitsDataModule")
