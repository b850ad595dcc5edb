from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks.devices import check_device, describe_devices, describe_precision
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


@pytest.mark.parametrize(
    ("device", "precision", "matmul_precision", "expected"),
    [
        ("cpu", "bf16-mixed", "highest", "precision bf16-mixed"),
        ("cpu", "32-true", "highest", "precision 32-true (bf16-mixed is faster where the hardware supports it)"),
        ("cuda", "32-true", "high", "precision 32-true (bf16-mixed is faster where the hardware supports it; "
                                    "matrix products in TF32)"),
        ("cuda", "16-mixed", "high", "precision 16-mixed (bf16-mixed is faster where the hardware supports it)"),
    ],
)  # fmt: skip
def test_describe_precision(
    device: str, precision: str, matmul_precision: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul_precision)
    assert describe_precision(fake_trainer(device, precision=precision)) == expected


def test_full_float32_matmul_precision_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch.set_float32_matmul_precision('high') is faster" in describe_precision(fake_trainer("cuda"))
