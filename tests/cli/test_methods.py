"""Distillation methods and a user's own losses, as a user runs them from the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_options import QUICK, QUIET

from kd_lightning import DistillationModule
from kd_lightning.networks import ResNet

Command = Callable[..., str]

UNCHECKED = "--model.teacher_check=off"

MY_LOSS = """
import torch.nn.functional as F
from torch import nn

from kd_lightning.losses import DistillationLoss


class PooledLoss(DistillationLoss):
    def __init__(self, *, weight=1.0):
        super().__init__(weight=weight, student_layers=["layer3"], teacher_layers=["layer3"])

    def build(self, student, teacher, **networks):
        self.project = nn.Linear(student.features["layer3"].shape[1], teacher.features["layer3"].shape[1])

    def forward(self, student, teacher, labels):
        projected = self.project(student.features["layer3"].mean((2, 3)))
        return F.mse_loss(projected, teacher.features["layer3"].mean((2, 3)))
"""

MY_LOSSES = """
model:
  init_args:
    losses:
      hard: {class_path: HardTargetLoss}
      pooled: {class_path: my_losses.PooledLoss, init_args: {weight: 10.0}}
"""


@pytest.fixture
def teacher(tmp_path: Path) -> tuple[str, ResNet]:
    network = ResNet([2, 2, 2], [16, 32, 64], in_channels=1)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    return str(tmp_path / "teacher.pt"), network


def test_a_loss_of_ones_own(
    kd: Command, teacher: tuple[str, ResNet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_losses.py").write_text(MY_LOSS)
    (tmp_path / "mine.yaml").write_text(MY_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    kd("fit", "-c", "digits/distill", "-c", "mine.yaml", "--teacher", teacher[0], *QUICK, UNCHECKED)
    checkpoint = tmp_path / "lightning_logs/digits/distill/version_0/checkpoints/best.ckpt"
    module = DistillationModule.load_from_checkpoint(checkpoint)
    assert module.losses["pooled"].weight == 10.0
    assert module.losses["pooled"].project.out_features == 64
    assert "test/accuracy" in kd("test", "-c", "digits/distill", *QUIET)


def test_simkd_takes_the_classifier_of_the_teacher_that_is_named(
    kd: Command, teacher: tuple[str, ResNet], tmp_path: Path
) -> None:
    path, network = teacher
    kd("fit", "-c", "digits/simkd", "--teacher", path, *QUICK, UNCHECKED)
    run = tmp_path / "lightning_logs/digits/simkd/version_0"
    saved = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["network.fc.weight"], network.fc.weight)
    with_teacher = kd("test", "-c", "digits/simkd", *QUIET)
    figures = json.loads((run / "test.json").read_text())
    Path(path).unlink()  # the student has all that it needs in its own checkpoint
    printed = kd("test", "-c", "digits/simkd", *QUIET)
    assert "test/agreement" in with_teacher
    assert "agreement with the teacher is left out" in printed
    assert json.loads((run / "test.json").read_text())["accuracy"] == figures["accuracy"]
    code = (
        "from kd_lightning import DistillationModule\n"
        f"module = DistillationModule.load_from_checkpoint({str(run / 'checkpoints/best.ckpt')!r}, teacher=None)\n"
        "print(module.student.avgpool.projector[0])"
    )  # in a process that knows nothing of the command line
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.startswith("Conv2d(8, 32")


def test_several_teachers(kd: Command, teacher: tuple[str, ResNet], tmp_path: Path) -> None:
    member = (
        "{class_path: kd_lightning.networks.from_checkpoint, init_args: {path: %s, network: {class_path: "
        "kd_lightning.networks.ResNet, init_args: {blocks: [2, 2, 2], widths: [16, 32, 64], in_channels: 1}}}}"
    )
    overlay = "model: {init_args: {teacher: {class_path: kd_lightning.networks.EnsembleTeacher, init_args: {networks: ["
    (tmp_path / "two.yaml").write_text(f"{overlay}{member % teacher[0]}, {member % 'digits/teacher'}]}}}}}}}}\n")
    with pytest.raises(
        SystemExit, match=r"'digits/teacher' is not trained yet; run `kd-lightning fit -c digits/teacher` first"
    ):
        kd("fit", "-c", "digits/distill", "-c", "two.yaml", *QUICK, UNCHECKED)
    kd("fit", "-c", "digits/teacher", *QUICK)
    printed = kd("fit", "-c", "digits/distill", "-c", "two.yaml", *QUICK, UNCHECKED)
    assert "The teacher is lightning_logs/digits/teacher/version_0/checkpoints/best.ckpt." in printed
    assert "test/agreement" in kd("test", "-c", "digits/distill", *QUIET)


HEADS = """
model:
  init_args:
    losses:
      hard: {class_path: HeadLoss, init_args: {loss: {class_path: HardTargetLoss}, student_head: fc}}
      token:
        class_path: HeadLoss
        init_args: {loss: {class_path: HardDistillationLoss, init_args: {weight: 0.25}}, student_head: fc}
"""


def test_a_loss_on_one_head(kd: Command, teacher: tuple[str, ResNet], tmp_path: Path) -> None:
    (tmp_path / "heads.yaml").write_text(HEADS)
    kd("fit", "-c", "digits/distill", "-c", "heads.yaml", "--teacher", teacher[0], *QUICK, UNCHECKED)
    checkpoint = tmp_path / "lightning_logs/digits/distill/version_0/checkpoints/best.ckpt"
    module = DistillationModule.load_from_checkpoint(checkpoint)
    assert (module.losses["token"].weight, module.losses["token"].teacher_layers) == (0.25, ())
