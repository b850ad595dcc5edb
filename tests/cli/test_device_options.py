import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator

from kd_lightning.cli.device_options import choose_accelerator, set_matmul_precision
from kd_lightning.cli.trainer_errors import explain_device_error

QUICK = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.usefixtures("on_a_mac")
def test_auto_is_the_cpu_on_a_mac(kd: Callable[..., str]) -> None:
    assert choose_accelerator("auto") == "cpu"
    assert choose_accelerator("mps") == "mps"
    printed = kd("fit", "-c", "digits/student", *QUICK)
    assert "Apple's MPS is not supported, so this runs on the CPU." in printed
    assert "The best checkpoint is" in printed


def test_auto_stays_elsewhere() -> None:
    assert choose_accelerator("auto") == "auto"


@pytest.mark.parametrize("accelerator", [CPUAccelerator, CUDAAccelerator])
def test_only_a_gpu_multiplies_in_tf32(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    set_matmul_precision(SimpleNamespace(accelerator=accelerator()))  # type: ignore[arg-type]
    assert chosen == (["high"] if accelerator is CUDAAccelerator else [])


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--tf32=false"], False)])
def test_the_flag_leaves_the_precision(
    flags: list[str], expected: bool, kd: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    monkeypatch.setattr("kd_lightning.cli.lightning_cli.set_matmul_precision", trainers.append)
    kd("fit", "-c", "digits/student", "--trainer.accelerator=cpu", *QUICK, *flags)
    assert bool(trainers) == expected
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_machine_without_a_gpu_says_so(accelerator: str, kd: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match=r"^kd-lightning fit: There is no GPU that torch can use on this machine; "):
        kd("fit", "-c", "digits/student", f"--trainer.accelerator={accelerator}")


def test_other_errors_are_not_explained() -> None:
    assert explain_device_error("`Trainer(devices='0')` value is not a valid input using cpu accelerator.") is None


def test_advertisements_are_dropped(kd: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        kd("fit", "-c", "digits/student", "--trainer.accelerator=cpu", *QUICK)
    lines = " ".join(record.getMessage() for record in caplog.records)
    assert "Speed: trains on the CPU; precision 32-true" in lines
    assert "litlogger" not in lines
