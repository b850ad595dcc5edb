import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator

from kd_lightning.cli.device_options import choose_accelerator, choose_precision, set_matmul_precision
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


@pytest.mark.parametrize(
    ("accelerator", "devices", "expected"),
    [
        ("auto", "auto", "16-mixed"),  # of the slowest of them
        ("gpu", 1, "bf16-mixed"),
        ("cuda", "2", "16-mixed"),
        ("gpu", -1, "16-mixed"),
        ("gpu", [0, 2], "bf16-mixed"),
        ("gpu", [7], None),
        ("cpu", "auto", "32-true"),
        ("tpu", "auto", None),
    ],
)
def test_the_precision_is_that_of_the_devices(
    accelerator: str, devices: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = [(8, 0), (7, 5), (9, 0)]
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr("kd_lightning.callbacks.devices._cpu_features", frozenset)
    assert choose_precision(accelerator, devices, "auto") == expected


@pytest.mark.parametrize(
    ("flags", "features", "expected"),
    [
        (["--auto_precision=true"], "amx_bf16", "precision bf16-mixed, the fastest of this CPU;"),
        (["--auto_precision=true"], "avx2", "precision 32-true, the fastest of this CPU;"),
        (
            ["--auto_precision=true", "--trainer.precision=32"],
            "amx_bf16",
            "precision 32-true (bf16-mixed is faster here);",
        ),
        ([], "amx_bf16", "precision 32-true (bf16-mixed is faster here);"),
    ],
)
def test_a_chosen_precision_is_in_the_line_on_speed_and_not_in_the_configuration(
    flags: list[str],
    features: str,
    expected: str,
    kd: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("kd_lightning.callbacks.devices._cpu_features", lambda: frozenset([features]))
    kd("fit", "-c", "digits/student", "--trainer.accelerator=cpu", *QUICK, *flags)
    assert expected in caplog.text
    config = yaml.safe_load(Path("lightning_logs/digits/student/version_0/config.yaml").read_text())
    assert config["trainer"]["precision"] == (32 if len(flags) == 2 else None)


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
