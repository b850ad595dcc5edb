"""Full float32 around the arithmetic of images, after which all settings are as before."""

import subprocess
import sys

import pytest
import torch

from kd_lightning.data.augmentation.full_float32 import full_float32

CPU = torch.device("cpu")


def test_settings_come_back_also_after_an_error() -> None:
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_float32(CPU):
                assert torch.zeros(1).dtype == torch.float32
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            with pytest.raises(ZeroDivisionError), full_float32(CPU):
                raise ZeroDivisionError
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


PROGRAM = """
import sys, torch
from kd_lightning.data.augmentation.full_float32 import full_float32

def settings():
    backends = torch.backends
    return (
        torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32,
        backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision,
    )

exec(sys.argv[1])
before = settings()
factors = torch.randn(512, 512, device="cuda")
exact = (factors.double() @ factors.double()).float()
with full_float32(torch.device("cuda")):
    assert (factors @ factors - exact).abs().max() < 1e-3
assert settings() == before
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "choice",
    [
        "pass",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cudnn.allow_tf32 = False",
    ],
)
def test_settings_of_tf32_can_be_read_and_are_as_before(choice: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
