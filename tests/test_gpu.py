"""What only a CUDA device shows: `python -m pytest -m gpu`, and every combination with `-m 'gpu and slow'`."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from faults import Command, environment
from recipe_runs import DEVICE_RECIPES, fit_arguments, save_network
from resume_check import check_resume, tensors_in
from unusual_networks import WithDropout

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.losses import ContrastiveLoss, HardTargetLoss, SoftTargetLoss
from kd_lightning.networks import ResNet
from kd_lightning.recipes import recipe_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*"),  # the scaler of 16-mixed leaves out first steps
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # of the runs on the CPU here
    # torch 2.11's own use of its own functions
    pytest.mark.filterwarnings("ignore:The argument 'device' of Tensor.(pin_memory|is_pinned).*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32.*:UserWarning"),
]

Trainers = Callable[..., pl.Trainer]
Commands = Callable[..., str]

GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1"]
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
PRECISIONS = ["bf16-mixed", "16-mixed", "32-true"]
QUICK = [
    *("--trainer.max_epochs=2", "--trainer.log_every_n_steps=3", "--data.batch_size=128"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]
FAST = [(name, "bf16-mixed") for name in DEVICE_RECIPES] + list(
    product(["digits/distill", "digits/reviewkd", "digits/crd", "digits/qat", "adapt/cdan"], ["16-mixed", "32-true"])
)


# steps


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow)
        for pair in product(recipe_names(), PRECISIONS)
    ],
)
def test_a_recipe_takes_two_steps(name: str, precision: str, kd: Commands, tmp_path: Path) -> None:
    printed = kd(*fit_arguments(name, tmp_path), *GPU, f"--trainer.precision={precision}")
    assert "The best checkpoint is" in printed


@pytest.mark.parametrize("name", ["digits/distill", pytest.param("digits/teacher", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_train(name: str, kd: Commands, tmp_path: Path) -> None:
    arguments = fit_arguments(name, tmp_path)
    kd(*arguments, *GPU, "--model.compile=true", "--trainer.precision=bf16-mixed")
    assert "test/accuracy" in kd("test", "-c", name, *GPU)


# what is said


def test_the_line_on_speed(kd: Commands, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        kd(*fit_arguments("digits/teacher", tmp_path), *GPU, "--tf32=false")
        assert "matrix products in full float32" in caplog.text
        assert torch.get_float32_matmul_precision() == "highest"
        kd(*fit_arguments("digits/teacher", tmp_path), *GPU)
        assert "matrix products in TF32" in caplog.text
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert f"trains on 1 GPU ({torch.cuda.get_device_name()})" in caplog.text


def test_a_gpu_that_does_not_exist(kd: Commands, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"trainer.devices names the GPUs \[97\], and this machine has \[0"):
        kd(*fit_arguments("digits/teacher", tmp_path), "--trainer.accelerator=gpu", "--trainer.devices=[97]")


def test_a_full_memory_is_one_sentence(kd: Commands, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(SystemExit, match=r"The memory of cuda:0 is full; lower batch_size \(1024 now\)"):
            kd("fit", "-c", "digits/teacher", *GPU, *QUICK, "--data.batch_size=1024",
               "--model.network.widths=[512, 1024, 2048]")  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# checkpoints and caches


def figures(run: Path) -> dict[str, float]:
    found = json.loads((run / "test.json").read_text())
    return {name: found[name] for name in ("accuracy", "loss", "ece")}


@pytest.mark.parametrize(("first", "second"), [(GPU, CPU), (CPU, GPU)], ids=["gpu to cpu", "cpu to gpu"])
def test_a_checkpoint_serves_the_other_device(
    first: list[str], second: list[str], kd: Commands, tmp_path: Path
) -> None:
    run = tmp_path / "lightning_logs/digits/distill/version_0"
    teacher = save_network("digits", "teacher", tmp_path)
    kd("fit", "-c", "digits/distill", "--teacher", str(teacher), "--model.teacher_check=off", *QUICK, *first)
    saved = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert {tensor.device.type for tensor in tensors_in(saved)} == {"cpu"}
    kd("test", "-c", "digits/distill", *first)
    expected = figures(run)
    kd("test", "-c", "digits/distill", *second)
    assert figures(run) == pytest.approx(expected, abs=6e-3)  # two of 360 images
    kd("fit", "-c", "digits/distill", *second, "--ckpt_path=last", "--trainer.max_epochs=3")
    kd("export", "digits/distill", "-o", "student.onnx")


def test_a_machine_without_a_gpu_tests_what_a_gpu_has_trained(kd: Commands, tmp_path: Path) -> None:
    kd("fit", "-c", "digits/student", *QUICK, *GPU)
    command = [sys.executable, "-m", "kd_lightning", "test", "-c", "digits/student", "--trainer.accelerator=auto"]
    there = {**os.environ, **environment([]), "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    assert "test/accuracy" in printed.stdout


def test_cached_logits_of_a_gpu_are_refused_on_a_cpu(kd: Commands, tmp_path: Path) -> None:
    teacher = save_network("digits", "teacher", tmp_path)
    fit = ["fit", "-c", "digits/distill", "--teacher", str(teacher), "--model.teacher_check=off", *QUICK]
    fit += ["--data.views=2", "--model.teacher_cache=logits"]
    kd(*fit, *GPU)
    kd(*fit, *GPU)
    with pytest.raises(SystemExit, match=r"were computed differently \(different: device, precision\)"):
        kd(*fit, *CPU)


# runs that are cut


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_killed_run_resumes_to_the_same_bits(precision: str, tmp_path: Path) -> None:
    teacher = save_network("digits", "teacher", tmp_path)
    arguments = ["fit", "-c", "digits/distill", "--teacher", str(teacher), "--model.teacher_check=off", *QUICK, *GPU]
    arguments += ["--trainer.deterministic=true", f"--trainer.precision={precision}"]
    arguments += ["--trainer.callbacks+=faults.Faults", "--progress.every_n_train_steps=3"]
    whole = Command(tmp_path / "whole", *arguments)
    assert whole.wait() == 0, whole.output
    kill = {"hook": "on_train_batch_start", "batch": 12, "signal": signal.SIGKILL}
    cut = Command(tmp_path / "cut", *arguments, plan=[kill])
    assert cut.wait() == -signal.SIGKILL, cut.output
    resumed = Command(tmp_path / "cut", *arguments, "--ckpt_path=last")
    assert resumed.wait() == 0, resumed.output
    expected, found = (
        torch.load(next((tmp_path / folder).rglob("last.ckpt")), weights_only=True)["state_dict"]
        for folder in ("whole", "cut")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def small(width: int = 4) -> ResNet:
    return ResNet([1, 1], [width, 2 * width], in_channels=1)


@pytest.mark.parametrize("kind", ["dropout", "queue"])
def test_a_run_resumes_within_an_epoch_to_the_same_bits(kind: str, make_trainer: Trainers, tmp_path: Path) -> None:
    def terms() -> dict[str, Any]:
        queue = ContrastiveLoss(queue_size=64, student_layers=["avgpool"])
        return {"hard": HardTargetLoss(), "soft": SoftTargetLoss(4.0), "queue": queue}

    fits = partial(make_trainer, accelerator="gpu", devices=1, max_epochs=3, limit_train_batches=3, deterministic=True)
    data = partial(DigitsDataModule, batch_size=32)
    if kind == "dropout":
        check_resume(fits, tmp_path, data, TeacherModule, network=WithDropout)
    else:
        module = partial(DistillationModule, teacher_check="off")
        check_resume(fits, tmp_path, data, module, student=small, teacher=partial(small, 8), losses=terms)


# several GPUs


class KeepWeights(pl.Callback):
    """Writes each rank's weights, and on the first the images per second of the last epoch."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = {name: value.cpu() for name, value in pl_module.state_dict().items()}
        speed = float(trainer.callback_metrics["train/images_per_second"])
        torch.save({"weights": weights, "speed": speed}, f"rank-{trainer.global_rank}.pt")


def fit_on(devices: int, folder: Path, *more: str) -> list[dict[str, Any]]:
    """Fit on some GPUs by DDP over NCCL, and return what each rank kept."""
    folder.mkdir()
    teacher = save_network("digits", "teacher", folder)
    arguments = ["fit", "-c", "digits/distill", "--teacher", str(teacher), "--model.teacher_check=off", *QUICK, *more]
    arguments += ["--trainer.accelerator=gpu", f"--trainer.devices={devices}", "--trainer.strategy=ddp"]
    run = Command(folder, *arguments, "--trainer.callbacks+=test_gpu.KeepWeights")
    assert run.wait(240) == 0, run.output
    assert re.search(rf"trains on {devices} GPUs? \(", run.output)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(devices)]


def test_ddp_on_one_gpu_trains_as_without_it(kd: Commands, tmp_path: Path) -> None:
    (kept,) = fit_on(1, tmp_path / "ddp")
    teacher = tmp_path / "ddp/teacher.pt"
    kd("fit", "-c", "digits/distill", "--teacher", str(teacher), "--model.teacher_check=off", *QUICK, *GPU)
    alone = torch.load(next((tmp_path / "lightning_logs").rglob("last.ckpt")), weights_only=True)["state_dict"]
    for name, value in alone.items():
        torch.testing.assert_close(kept["weights"][name], value, rtol=1e-2, atol=1e-3)


def test_all_gpus_train_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices = torch.cuda.device_count()
    if devices < 2:
        pytest.skip("there is one GPU")
    first, *others = fit_on(devices, tmp_path / "all", "--trainer.max_epochs=4")
    for other in others:
        assert all(torch.equal(other["weights"][name], value) for name, value in first["weights"].items()
                   if not name.endswith(("running_mean", "running_var")))  # fmt: skip
    (alone,) = fit_on(1, tmp_path / "one", "--trainer.max_epochs=4")
    with capsys.disabled():
        print(f"\n{devices} GPUs: {first['speed']:,.0f} images/s, {first['speed'] / alone['speed'] / devices:.0%} of "
              f"{devices} times one")  # fmt: skip
