from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks.devices import check_device, describe_devices, describe_precision, fastest_precision
from kd_lightning.networks import ResNet


def fake_trainer(device: str, processes: int = 1, precision: str = "32-true") -> Any:
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, world_size=processes, precision=precision)


def test_mps_is_refused_before_the_first_step(
    small: Callable[..., ResNet],
    make_trainer: Callable[..., pl.Trainer],
    digits: DigitsDataModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(trainer.accelerator, "setup_device", lambda device: None)
    trainer.strategy._root_device = torch.device("mps")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not tested on Apple's MPS; train with accelerator='cpu', or on a CUDA GPU"):
        trainer.fit(TeacherModule(small()), digits)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_cpu_and_cuda_are_accepted(device: str) -> None:
    check_device(fake_trainer(device))


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [
        ("cpu", 1, "trains on the CPU"),
        ("cpu", 2, "trains on the CPU in 2 processes"),
        ("cuda", 1, "trains on 1 GPU (Card)"),
        ("cuda:3", 4, "trains on 4 GPUs (Card)"),
        ("xpu:0", 1, "trains on xpu:0"),
    ],
)
def test_describe_devices(device: str, processes: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    assert describe_devices(fake_trainer(device, processes)) == expected


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that the CPU has some features and all GPUs a compute capability."""

    def pretend(features: str = "", capability: tuple[int, int] = (8, 0)) -> None:
        monkeypatch.setattr("kd_lightning.callbacks.devices._cpu_features", lambda: frozenset(features.split()))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


@pytest.mark.parametrize(
    ("device", "features", "capability", "expected"),
    [
        ("cpu", "fpu avx2", (8, 0), "32-true"),
        ("cpu", "fpu avx512_bf16", (7, 0), "bf16-mixed"),
        ("cpu", "amx_bf16", (7, 0), "bf16-mixed"),
        ("cuda", "", (7, 5), "16-mixed"),
        ("cuda:1", "", (8, 0), "bf16-mixed"),
        ("cuda", "", (12, 0), "bf16-mixed"),
    ],
)
def test_the_fastest_precision_is_that_of_the_hardware(
    device: str, features: str, capability: tuple[int, int], expected: str, hardware: Callable[..., None]
) -> None:
    hardware(features, capability)
    assert fastest_precision(torch.device(device)) == expected


@pytest.mark.parametrize(
    ("device", "precision", "features", "expected"),
    [
        ("cpu", "bf16-mixed", "amx_bf16", "precision bf16-mixed, the fastest of this CPU"),
        ("cpu", "32-true", "amx_bf16", "precision 32-true (bf16-mixed is faster here)"),
        ("cpu", "32-true", "", "precision 32-true, the fastest of this CPU"),
        ("cpu", "64-true", "", "precision 64-true"),
        ("cuda", "32-true", "", "precision 32-true (bf16-mixed is faster here; matrix products in TF32)"),
        ("cuda", "16-mixed", "", "precision 16-mixed (bf16-mixed is faster here)"),
        ("xpu", "32-true", "", "precision 32-true"),
    ],
)
def test_describe_precision(
    device: str,
    precision: str,
    features: str,
    expected: str,
    hardware: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hardware(features)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert describe_precision(fake_trainer(device, precision=precision)) == expected


def test_full_float32_matmul_precision_is_reported(hardware: Callable[..., None]) -> None:
    hardware()
    assert "torch.set_float32_matmul_precision('high') is faster" in describe_precision(fake_trainer("cuda"))
