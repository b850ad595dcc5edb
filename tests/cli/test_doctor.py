"""`kd-lightning doctor`: what the machine can do, to paste into an issue."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kd_lightning.cli.doctor as doctor_module
import kd_lightning.cli.machine as machine

Command = Callable[..., str]


@pytest.fixture
def few_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_PHOTOGRAPHS", 40)


@pytest.mark.usefixtures("few_photographs")
def test_it_prints_a_block_that_can_be_pasted(kd: Command, tmp_path: Path) -> None:
    printed = kd("doctor").splitlines()
    assert (printed[0], printed[-1]) == ("```text", "```")
    named = [line.partition(" ")[0] for line in printed[1:-1]]
    assert named[:7] == ["kd_lightning", "packages", "CPU", "GPU", "precision", "loading", "optional"]
    assert set(named[7:]) <= {"missing"}
    assert f"torch {torch.__version__.partition('+')[0]}" in printed[2]
    assert "JPEG photographs of 500x375 a second" in printed[6]
    assert not any("failed" in line for line in printed)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.usefixtures("few_photographs")
def test_what_fails_is_said_and_the_rest_is_printed(kd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise RuntimeError("libcudart.so is broken\nin many lines")

    monkeypatch.setattr(doctor_module, "describe_gpus", broken)
    printed = kd("doctor")
    assert "GPU           failed with RuntimeError: libcudart.so is broken\n" in printed
    assert "loading" in printed


def test_missing_packages_are_named_with_their_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "installed", lambda name: "2.5.0" if name == "torch" else None)
    monkeypatch.setattr(doctor_module, "requires", lambda _: ["torch>=2.11,<3", "pillow>=10.3", 'onnx; extra == "x"'])
    for name in ("_describe_precision", "_describe_loading"):
        monkeypatch.setattr(doctor_module, name, lambda: "quick")
    missing = [str(text) for title, text in doctor_module._lines() if title == "missing"]
    assert missing[0].startswith("torch 2.5.0 (needed: torch")
    assert missing[1] == "pillow is not installed (needed: pillow>=10.3)"
    assert 'onnx (export to ONNX: pip install "kd-lightning[export]")' in missing
    assert "timm (networks of timm: pip install timm)" in missing


@pytest.mark.parametrize(("cuda", "visible", "reason"), [(None, None, "for the CPU"), ("13.0", "", "hides all")])
def test_it_says_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, visible: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if visible is None else visible)
    [line] = machine.describe_gpus()
    assert reason in line


def test_each_gpu_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert machine.describe_gpus() == ["NVIDIA H100, 80.0 GiB, compute capability 9.0"] * 2


def test_small_shared_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 * 2**20))
    assert "--shm-size" in str(machine.shared_memory_problem(tmp_path))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(total=2**33))
    assert machine.shared_memory_problem(tmp_path) is None
